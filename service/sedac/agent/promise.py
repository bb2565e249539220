"""The promise of each request, fixed when it arrives: exact, or bounded by a tier of the policy in force.

A bounded request may be reduced; the KV it writes is kept apart from that of every other promise by a cache salt that names
its tier, its own knobs and its certificate. An exact one is never reduced, whatever policy comes later, and never reads KV that was written
under a bounded decision. The workers find the promise in `SamplingParams.extra_args`, under the four keys of policy.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from vllm.exceptions import VLLMValidationError

from sedac.policy import CERTIFICATE_KEY, EXACT, LEVEL_KEY, SCALE_KEY, TIER_KEY, Policy

BOUNDED_SALT = "sedac-bounded:"


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What requests that arrive now are promised by."""

    policy: Policy
    """not enabled: every request is exact"""
    levels: tuple[str, ...]
    """of the engine, that a request may choose from where the policy allows overrides"""


def stamp(request: Any, terms: Terms) -> None:
    """Fix the promise of an `EngineCoreRequest` in place.

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
    tier = _find_tier(extra, terms.policy)
    overrides = _read_overrides(extra, terms, tier)
    extra = {key: value for key, value in extra.items() if key not in (SCALE_KEY, LEVEL_KEY, CERTIFICATE_KEY)}
    if tier == EXACT or not terms.policy.enabled:
        params.extra_args = {**extra, TIER_KEY: EXACT}
        return
    certificate = terms.policy.certificate
    if certificate and certificate.tier == tier and not overrides and request.lora_request is None:
        overrides = {CERTIFICATE_KEY: certificate.knobs_sha256}  # so that it reads no KV of before these knobs
    params.extra_args = {**extra, **overrides, TIER_KEY: tier}
    knobs = "".join(f"+{key}={quote(str(value), safe='')}" for key, value in sorted(overrides.items()))
    request.cache_salt = f"{BOUNDED_SALT}{tier}{knobs}:{salt}"


def _find_tier(extra: dict[str, Any], policy: Policy) -> str:
    known = [EXACT, *(tier.name for tier in policy.get_tiers())]
    tier = extra.get(TIER_KEY)
    if tier is None:
        return policy.default_tier
    if tier not in known:
        names = ", ".join(map(repr, known))
        raise VLLMValidationError(
            f"{TIER_KEY} is unknown; tiers: {names}, or leave it out for {policy.default_tier!r}", parameter=TIER_KEY, value=tier
        )
    return str(tier)


def _read_overrides(extra: dict[str, Any], terms: Terms, tier: str) -> dict[str, Any]:
    found = {key: extra[key] for key in (SCALE_KEY, LEVEL_KEY) if extra.get(key) is not None}
    for key, value in found.items():
        if not terms.policy.allow_overrides:
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
    if level is not None and level not in terms.levels:
        raise VLLMValidationError(f"{LEVEL_KEY} is unknown; levels: {', '.join(map(repr, terms.levels))}", parameter=LEVEL_KEY, value=level)
    return found


def install(input_processor: Any, find_terms: Callable[[], Terms]) -> None:
    """Stamp every request that passes vLLM's input processor (v1/engine/input_processor.py, 0.32), raw or rendered."""
    process: Callable[..., Any] = input_processor.process_inputs
    process_async: Callable[..., Awaitable[Any]] = input_processor.process_inputs_async

    @functools.wraps(process)
    def process_inputs(*args: Any, **kwargs: Any) -> Any:
        request = process(*args, **kwargs)
        stamp(request, find_terms())
        return request

    async def process_inputs_async(*args: Any, **kwargs: Any) -> Any:
        request = await process_async(*args, **kwargs)
        stamp(request, find_terms())
        return request

    input_processor.process_inputs = process_inputs
    input_processor.process_inputs_async = process_inputs_async
