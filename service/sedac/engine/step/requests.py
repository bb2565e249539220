"""The requests of a worker: what each one's tier lets its tokens get, and what it was computed with.

A request is bounded where its `vllm_xargs` name a tier under TIER_KEY: the server's stamp does (agent/promise.py, which knows the default
tier), and so may whoever drives the engine without the server. One that names none is exact, whatever policy is in force.
A token counts as prompt by its position, not by how it was scheduled, so recomputing a preempted request or splitting a
prompt changes nothing. T tokens of the step, N requests of the step.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sedac.engine.backends.tokens import DECIDES, OBSERVED, SOFT, Tokens
from sedac.engine.step.sides import SIDES, Side
from sedac.engine.step.state import State
from sedac.policy.model import EXACT, Policy, Speculation, Tier
from sedac.policy.request_keys import CERTIFICATE_KEY, LEVEL_KEY, ROLLOUT_KEY, SCALE_KEY, SPECULATION_KEY, TIER_KEY

_MAX_FINISHED = 1000

Array = np.ndarray[Any, Any]


@dataclass(kw_only=True)
class _Request:
    tier: str
    level: str | None
    scale: float
    certificate: str
    """Digest of its knobs, as promised. Empty where it is uncertified, from the start or since other knobs were in force."""
    rollout: int = 0
    """Number of the roll-out whose candidate shall serve it while it is in force. 0 means none."""
    version: int = -1
    """Version of what is in force, for which the fields below were resolved."""
    revision: int = 0
    side: Side | None = None
    probe_set_sha256: str = ""
    """Digest of the probe set of the certificate under which it was first computed."""
    may_draft: bool = True
    """Whether its sampling parameters and its own wish allow drafts."""
    tier_row: int = 0
    is_bounded: bool = False
    floor: int = 0
    goal: int = 0
    role: int = 0
    own_scale: float = 1.0
    num_tokens: int = 0
    num_saved: float = 0.0
    prompt_risk: float = 0.0
    num_prompt_risks: int = 0
    difficulty: float | None = None
    """Factor on the thresholds from the prompt's own risk, known once the prompt is over."""


class Requests:
    """Tracks requests by the engine's ids; driven by the worker once per step."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._running: dict[str, _Request] = {}
        self._finished: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self.num_bounded = 0
        """Number of running requests that ask for a tier other than exact."""
        self._version = -1
        """Version of what was in force when the tokens below were made."""
        self._cached: Tokens | None = None
        """Tokens of the last step, where each of its requests generated one."""
        self._cached_ids: list[str] = []
        state.count_requests = self._count_repeats

    def add(self, request_id: str, extra: dict[str, Any], *, may_draft: bool = True) -> None:
        """Remember a new request and its `vllm_xargs`; without TIER_KEY among them it is exact."""
        request = self._running[request_id] = _Request(
            tier=str(extra.get(TIER_KEY, EXACT)),
            level=extra.get(LEVEL_KEY),
            scale=float(extra.get(SCALE_KEY, 1.0)),
            certificate=str(extra.get(CERTIFICATE_KEY, "")),
            rollout=rollout if isinstance(rollout := extra.get(ROLLOUT_KEY), int) else 0,
            may_draft=may_draft and str(extra.get(SPECULATION_KEY, "true")).lower() not in ("false", "0", "no", "off"),
        )
        self.num_bounded += request.tier != EXACT

    def has(self, request_id: str) -> bool:
        """Whether a request with this id runs, or has finished without having been counted."""
        return request_id in self._running

    def finish(self, request_ids: Iterable[str]) -> None:
        """Keep only the reports of finished requests, and of these the newest."""
        for request_id in request_ids:
            if request_id in self._running:
                request = self._running.pop(request_id)
                self.num_bounded -= request.tier != EXACT
                self._finished[request_id] = self._make_report(request_id, request)
                if len(self._finished) > _MAX_FINISHED:
                    self._finished.popitem(last=False)

    def make_tokens(self, request_ids: list[str], bounds: Array, num_prompt: Array, num_computed: Array) -> Tokens:
        """Return what the step's tokens may get; `bounds` (N + 1) are the first rows of the requests, the others (N) counts."""
        state, is_single = self._state, len(request_ids) == bounds[-1]
        if is_single and self._cached is not None and self._version == state.version and self._cached_ids == request_ids:
            return self._cached  # the same requests go on generating, a token each
        state.count_repeats()  # they are of the requests below
        tokens = self._make_tokens(request_ids, bounds, num_prompt, num_computed)
        decoding = bool((num_computed >= num_prompt).all()) or all(side.policy.phase == "all" for side in state.sides)
        self._cached, self._version = tokens if decoding and is_single else None, state.version
        self._cached_ids = list(request_ids)
        return tokens

    def _make_tokens(self, request_ids: Sequence[str], bounds: Array, num_prompt: Array, num_computed: Array) -> Tokens:
        requests = [self._resolve(request_id) for request_id in request_ids]
        policies = [side.policy for _, side in requests]
        counts = np.diff(bounds)
        num_full = np.where([p.phase == "all" for p in policies], 0, np.clip(num_prompt - num_computed, 0, counts))

        def gather(values: Iterable[float], dtype: type) -> Array:
            """Return each request's value, repeated for each of its rows."""
            return np.repeat(np.fromiter(values, dtype=dtype, count=len(requests)), counts)

        offset_T = np.arange(bounds[-1]) - np.repeat(bounds[:-1], counts)
        bounded_T = gather((r.is_bounded for r, _ in requests), np.bool_)
        reducible_T = bounded_T & (offset_T >= np.repeat(num_full, counts))
        role_T = np.where(reducible_T, gather((r.role for r, _ in requests), np.uint8), np.uint8(0))
        if any(p.sensitivity > 0 for p in policies):
            observed_T = gather(
                (OBSERVED | side.role if side.policy.sensitivity > 0 and side.has_thresholds else 0 for _, side in requests), np.uint8
            )
            role_T = np.where(bounded_T & ~reducible_T, observed_T, role_T)
            for (request, side), full, count in zip(requests, num_full.tolist(), counts.tolist(), strict=True):
                if side.policy.sensitivity > 0 and request.difficulty is None and full < count:
                    mean = request.prompt_risk / request.num_prompt_risks if request.num_prompt_risks else math.nan
                    request.difficulty = side.difficulty.get_scale(mean, side.policy.sensitivity)
                    side.difficulty.add(mean)
        return Tokens(
            role_T=role_T,
            floor_T=np.where(reducible_T, gather((r.floor for r, _ in requests), np.uint8), np.uint8(0)),
            goal_T=gather((r.goal for r, _ in requests), np.uint8),
            scale_T=gather((r.own_scale * (r.difficulty or 1.0) for r, _ in requests), np.float32),
            tier_T=gather((r.tier_row for r, _ in requests), np.int64),
        )

    def _resolve(self, request_id: str) -> tuple[_Request, Side]:
        """Look the request's side and tier up in what is in force; no such tier, or a policy not enabled: served in full."""
        state, request = self._state, self._running[request_id]
        if request.side is not None and request.version == state.version:
            return request, request.side
        side, table = state.get_side(request.rollout), state.table
        if side is not request.side:
            request.prompt_risk, request.num_prompt_risks = 0.0, 0  # so far by other probes, or none
        policy, request.side, request.version, request.revision = side.policy, side, state.version, state.revision
        tier = next((t for t in policy.get_tiers() if t.name == request.tier), None) if policy.enabled else None
        request.is_bounded = tier is not None
        self._check_certificate(request, policy)
        tier = tier or Tier(name=EXACT)
        request.tier_row = state.get_tier_row(tier.name)
        level = tier.level if request.level is None or request.level not in table.names else request.level
        request.floor, request.goal = table.get_index(tier.floor), table.get_index(level)
        request.role = DECIDES | (SOFT if tier.soft_exit else 0) | side.role
        request.own_scale = tier.threshold_scale * request.scale
        return request, side

    def _check_certificate(self, request: _Request, policy: Policy) -> None:
        """Take the certificate of a request whose policy is switched off, or has another one: neither the certified answer nor the exact one."""
        has = policy.certificate if policy.enabled else None
        if has is None or has.knobs_sha256 != request.certificate or request.probe_set_sha256 not in ("", has.probe_set_sha256):
            request.certificate = ""
        elif has:
            request.probe_set_sha256 = has.probe_set_sha256

    def get_speculation(self, request_id: str) -> Speculation | None:
        """Return the knobs under which the request may draft now; None: it may not."""
        if not self._running[request_id].may_draft:
            return None
        request, side = self._resolve(request_id)
        speculation = side.policy.speculation
        if not speculation.enabled or (speculation.tiers and request.tier not in speculation.tiers):
            return None
        return speculation

    def count_plain(self, scheduled: Mapping[str, int]) -> None:
        """Count the tokens (by request) of a step in which nothing could be reduced."""
        running, is_enabled = self._running, self._state.is_enabled
        for request_id, count in scheduled.items():
            request = running[request_id]
            request.num_tokens += count
            if not is_enabled:
                request.certificate = ""  # nothing was resolved in this step

    def _count_repeats(self, saved_T: Array, num_steps: int) -> None:
        """Count steps in which the requests of the last tokens generated one token each; `saved_T` is of all of them together."""
        for request_id, saved in zip(self._cached_ids, saved_T.tolist(), strict=True):
            request = self._running[request_id]
            request.num_tokens += num_steps
            request.num_saved += saved

    def count_step(self, request_ids: Sequence[str], bounds: Array, saved_T: Array | None) -> None:
        """Count the step's tokens and what they saved to their requests."""
        is_enabled = self._state.is_enabled
        saved_N = np.zeros(len(request_ids)) if saved_T is None else np.add.reduceat(saved_T, bounds[:-1])
        for request_id, count, saved in zip(request_ids, np.diff(bounds).tolist(), saved_N.tolist(), strict=True):
            request = self._running[request_id]
            request.num_tokens += count
            request.num_saved += saved
            if not is_enabled:
                request.certificate = ""  # nothing was resolved in this step
        if saved_T is not None and any(side.policy.sensitivity > 0 for side in self._state.sides):
            self._count_risks(request_ids, bounds)

    def _count_risks(self, request_ids: Sequence[str], bounds: Array) -> None:
        tokens = self._state.observed_tokens
        assert tokens is not None
        observed_T = tokens.role_T & OBSERVED > 0
        for request_id, start, end in zip(request_ids, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            risk = self._state.risk_CT[:, start:end][:, observed_T[start:end]]
            request = self._running[request_id]
            request.prompt_risk += float(np.nansum(risk))
            request.num_prompt_risks += int((~np.isnan(risk)).sum())

    def _make_report(self, request_id: str, request: _Request) -> dict[str, Any]:
        blocks = request.num_tokens * self._state.layout.num_layers
        side = request.side or self._state.stable
        return {
            "request_id": request_id,
            "side": SIDES[side.number],
            "tier": request.tier,
            "certified": bool(request.certificate),
            "revision": request.revision,
            "num_tokens": request.num_tokens,
            "num_mlp_blocks_computed": blocks - request.num_saved,
            "mlp_share": (blocks - request.num_saved) / blocks if blocks else 1.0,
        }

    def get_report(self, request_id: str) -> dict[str, Any] | None:
        """Return the report of the request with this id, or of all its parts together; None: unknown.

        vLLM's own ids are the answer's id, then `-` and a number for each prompt and choice and a random part.
        """
        reports = [self._make_report(i, r) for i, r in self._running.items()] + list(self._finished.values())
        parts = [r for r in reports if r["request_id"] == request_id or r["request_id"].startswith(f"{request_id}-")]
        if not parts:
            return None
        tokens, blocks = sum(r["num_tokens"] for r in parts), sum(r["num_mlp_blocks_computed"] for r in parts)
        total = tokens * self._state.layout.num_layers
        share = blocks / total if total else 1.0
        whole = {"request_id": request_id, "num_tokens": tokens, "num_mlp_blocks_computed": blocks, "mlp_share": share}
        return parts[0] | whole | {"certified": all(r["certified"] for r in parts)}
