"""Metrics of roll-outs, audits and the guard, in the control service's registry; label sets are closed and pre-created."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge

from sedac.contract.v1 import evidence_pb2

_STATES = ("progressing", "paused", "promoted", "aborted")
_ACTIONS = ("rollback", "exact")
_SIDES = {evidence_pb2.SIDE_STABLE: "stable", evidence_pb2.SIDE_CANDIDATE: "candidate"}
_LIMITS = ("mean", "lower", "upper")


class RolloutMetrics:
    """What the analysis and the guard see and do."""

    def __init__(self, registry: CollectorRegistry) -> None:
        make: dict[str, Any] = {"registry": registry}
        self._state = Gauge("sedac_control_rollout_state", "1 for the state of the newest roll-out; all 0: none yet.", ["state"], **make)
        self._share = Gauge("sedac_control_rollout_share", "Share of the requests under the candidate; 0: no roll-out is under way.", **make)
        self.analyses = Counter("sedac_control_rollout_analyses", "Analyses of roll-outs, by verdict.", ["verdict"], **make)
        self.guard_actions = Counter("sedac_control_guard_actions", "Policies that the guard took out of force, by what it did.", ["action"], **make)
        labels = ["side", "tier", "limit"]  # limit: the mean or one of its limits
        self._losses = {
            "mismatch": Gauge("sedac_control_audit_mismatch", "Share of greedy tokens that the full model would not choose.", labels, **make),
            "nll_difference": Gauge(
                "sedac_control_audit_nll_difference", "What audited tokens lose in log-probability, mean in nats per token.", labels, **make
            ),
        }
        self._requests = Gauge("sedac_control_audit_requests", "Audited answers of the policies in force.", ["side", "tier"], **make)
        self._shown: set[tuple[str, str]] = set()
        for state in _STATES:
            self._state.labels(state)
        for verdict in ("breach", "none", "pass"):
            self.analyses.labels(verdict)
        for action in _ACTIONS:
            self.guard_actions.labels(action)

    def show_rollout(self, state: str, share: float) -> None:
        """Show the newest roll-out."""
        for name in _STATES:
            self._state.labels(name).set(name == state)
        self._share.set(share)

    def show_evidence(self, evidence: Iterable[evidence_pb2.TierEvidence]) -> None:
        """Show the estimates of both sides; the tiers are those of the policies in force, others are removed."""
        shown: set[tuple[str, str]] = set()
        for tier in evidence:
            key = (_SIDES[tier.side], tier.tier)
            shown.add(key)
            self._requests.labels(*key).set(tier.nll_difference.num_requests)
            for name, gauge in self._losses.items():
                for limit in _LIMITS:
                    gauge.labels(*key, limit).set(getattr(getattr(tier, name), limit))
        for key in self._shown - shown:
            self._requests.remove(*key)
            for gauge in self._losses.values():
                for limit in _LIMITS:
                    gauge.remove(*key, limit)
        self._shown = shown
