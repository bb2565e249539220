"""The promise of each request, fixed when it arrives: exact, or bounded by a tier of its side's policy.

Its side is the policy in force, or a roll-out's candidate for that roll-out's share of the keys. A bounded request may be reduced; the KV
it writes is kept apart from that of every other promise by a cache salt that names its tier, its roll-out, its own knobs and its
certificate. An exact one is never reduced, whatever policy comes later, and never reads KV that was written under a bounded decision.
The workers find the promise in `SamplingParams.extra_args`, under the keys of policy/request_keys.py: TIER_KEY is always among them, and a request
that reaches a worker without it, because it did not come through this server, is exact.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from sedac.agent.frontend import VLLMValidationError, hook_inputs
from sedac.agent.scoring import is_auditable
from sedac.policy.model import EXACT, Candidate, Policy
from sedac.policy.request_keys import AUDIT_KEY, CERTIFICATE_KEY, LEVEL_KEY, REQUEST_KEY, ROLLOUT_KEY, SCALE_KEY, SPECULATION_KEY, TIER_KEY

BOUNDED_SALT = "sedac-bounded:"
ASKED, KEPT = "asked", "kept"
"""Values of AUDIT_KEY: log-probabilities were asked for by the user as well, or are kept for the audit alone."""
_TAKEN = (SCALE_KEY, LEVEL_KEY, CERTIFICATE_KEY, REQUEST_KEY, ROLLOUT_KEY, AUDIT_KEY, SPECULATION_KEY)
_YES, _NO = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
"""Words for a flag of a request, in any case. JSON's true and false arrive as numbers (entrypoints/openai, 0.32: `vllm_xargs`)."""
_MAX_KEY_CHARS = 1024


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What requests that arrive now are promised by."""

    policy: Policy
    """The policy in force. While it is not enabled, every request that it serves is exact."""
    levels: tuple[str, ...]
    """Levels of the engine, from which a request may choose where the policy allows overrides."""
    candidate: Candidate | None = None
    can_audit: bool = False
    """Whether this engine's log-probabilities can be compared."""


def stamp(request: Any, terms: Terms, draw: Callable[[], float] = random.random) -> None:
    """Fix the promise of an `EngineCoreRequest` in place; `draw` returns numbers from 0 to 1 that choose which answers are audited.

    Raises:
        VLLMValidationError: the request asks for what it can't have (vLLM answers HTTP 400).
    """
    params = request.sampling_params
    if params is None:
        return
    extra = dict(params.extra_args or {})
    salt = request.cache_salt or ""
    if salt.startswith(BOUNDED_SALT):
        raise VLLMValidationError(f"cache_salt may not begin with {BOUNDED_SALT!r}; choose another", parameter="cache_salt", value=salt)
    candidate = _find_candidate(request, extra, terms)
    policy = candidate.policy if candidate else terms.policy
    tier = _find_tier(extra, policy)
    overrides = _read_overrides(extra, policy, terms.levels, tier)
    speculates = _read_flag(extra, SPECULATION_KEY)
    extra = {key: value for key, value in extra.items() if key not in _TAKEN}
    if not speculates:
        extra[SPECULATION_KEY] = False  # in no salt: drafts change no answer, and what they write is written again before it is read
    if candidate:
        extra[ROLLOUT_KEY] = candidate.rollout
    if tier == EXACT or not policy.enabled:
        params.extra_args = {**extra, TIER_KEY: EXACT}
        return
    certificate = policy.certificate
    if certificate and certificate.tier == tier and not overrides and request.lora_request is None:
        overrides = {CERTIFICATE_KEY: certificate.knobs_sha256}  # so that it reads no KV of before these knobs
    apart = {**overrides, "rollout": candidate.rollout} if candidate else overrides
    knobs = "".join(f"+{key}={quote(str(value), safe='')}" for key, value in sorted(apart.items()))
    request.cache_salt = f"{BOUNDED_SALT}{tier}{knobs}:{salt}"
    if terms.can_audit and draw() < policy.audit.share and is_auditable(request):
        extra[AUDIT_KEY] = KEPT if params.logprobs is None else ASKED
        params.logprobs = params.logprobs or 0
    params.extra_args = {**extra, **overrides, TIER_KEY: tier}


def _find_candidate(request: Any, extra: dict[str, Any], terms: Terms) -> Candidate | None:
    """Return the candidate where the request belongs to it; one that names a tier which only the policy in force has stays with that."""
    key, candidate = extra.get(REQUEST_KEY), terms.candidate
    if key is not None and (isinstance(key, bool) or not isinstance(key, str | int | float) or len(str(key)) > _MAX_KEY_CHARS):
        raise VLLMValidationError(f"{REQUEST_KEY} is no text or number of up to {_MAX_KEY_CHARS} characters", parameter=REQUEST_KEY)
    if candidate is None or not candidate.has(str(key) if key is not None else request.request_id):
        return None
    tier = extra.get(TIER_KEY)
    return candidate if tier is None or tier in _list_tiers(candidate.policy) or tier not in _list_tiers(terms.policy) else None


def _list_tiers(policy: Policy) -> list[str]:
    return [EXACT, *(tier.name for tier in policy.get_tiers())]


def _find_tier(extra: dict[str, Any], policy: Policy) -> str:
    known = _list_tiers(policy)
    tier = extra.get(TIER_KEY)
    if tier is None:
        return policy.default_tier
    if tier not in known:
        names = ", ".join(map(repr, known))
        raise VLLMValidationError(
            f"{TIER_KEY} is unknown; tiers: {names}, or leave it out for {policy.default_tier!r}", parameter=TIER_KEY, value=tier
        )
    return str(tier)


def _read_overrides(extra: dict[str, Any], policy: Policy, levels: tuple[str, ...], tier: str) -> dict[str, Any]:
    found = {key: extra[key] for key in (SCALE_KEY, LEVEL_KEY) if extra.get(key) is not None}
    for key, value in found.items():
        if not policy.allow_overrides:
            raise VLLMValidationError(
                f"{key} is not allowed by the policy in force; name a tier, or let the operator run `sedac ctl policy set --allow-overrides`",
                parameter=key,
                value=value,
            )
        if tier == EXACT:
            raise VLLMValidationError(f"{key} has no meaning for tier {EXACT!r}; leave it out or name another {TIER_KEY}", parameter=key, value=value)
    scale, level = found.get(SCALE_KEY), found.get(LEVEL_KEY)
    if scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale) or scale < 0:
            raise VLLMValidationError(f"{SCALE_KEY} is not a finite number >= 0; 1 is neutral", parameter=SCALE_KEY, value=scale)
        found[SCALE_KEY] = float(scale)
    if level is not None and level not in levels:
        raise VLLMValidationError(f"{LEVEL_KEY} is unknown; levels: {', '.join(map(repr, levels))}", parameter=LEVEL_KEY, value=level)
    return found


def _read_flag(extra: dict[str, Any], key: str) -> bool:
    """Return what a flag says; true where it is left out."""
    value = extra.get(key)
    word = str(value).lower() if isinstance(value, bool | int | str) else f"{value:g}" if isinstance(value, float) else ""
    if value is not None and word not in (*_YES, *_NO):
        raise VLLMValidationError(f"{key} is neither true nor false; leave it out for true", parameter=key, value=value)
    return word not in _NO


def install(input_processor: Any, find_terms: Callable[[], Terms]) -> None:
    """Stamp every request that passes vLLM's input processor, raw or rendered."""
    hook_inputs(input_processor, lambda request: stamp(request, find_terms()))
