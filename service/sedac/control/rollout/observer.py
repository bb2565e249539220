"""The loop that follows what engines measure: pools it, shows it in status and metrics, and hands it to the guard.

Reports that come while it works are looked at together afterwards, so that its cost does not grow with their number.
"""

from __future__ import annotations

import asyncio
import logging

from sedac.contract.v1 import evidence_pb2
from sedac.control.fleet.fleet import Fleet
from sedac.control.fleet.pooling import Evidence, pool
from sedac.control.rollout.changes import Changes
from sedac.control.rollout.estimates import to_tier_evidence
from sedac.control.rollout.guard import Guard, GuardStore, get_guard_confidence
from sedac.control.rollout.metrics import RolloutMetrics
from sedac.errors import StoreFailed

_log = logging.getLogger(__name__)
_SETTLE_SECONDS = 0.1
_RETRY_SECONDS = 1.0


class Observer:
    """Follows one fleet; `run` until it closes."""

    def __init__(self, fleet: Fleet, changes: Changes, kept: GuardStore, guard: Guard, metrics: RolloutMetrics) -> None:
        self._fleet, self._changes, self._kept, self._guard, self._metrics = fleet, changes, kept, guard, metrics
        self._problems: tuple[str, ...] = ()

    async def run(self) -> None:
        """Follow until the fleet closes."""
        fleet = self._fleet
        while not fleet.closing:
            await fleet.reported.wait()
            fleet.reported.clear()
            try:
                await self._look()
            except StoreFailed as error:
                _log.error("evidence will be looked at again: %s", error)
                fleet.reported.set()
                await asyncio.sleep(_RETRY_SECONDS)
            except Exception:  # noqa: BLE001  a guard that is dead looks like one that sees nothing
                _log.exception("looking at evidence failed; the next report is looked at again")
            await asyncio.sleep(_SETTLE_SECONDS)

    async def _look(self) -> None:
        fleet, revision = self._fleet, self._fleet.desired
        if fleet.acknowledged:
            done = set(fleet.acknowledged)
            await asyncio.to_thread(self._kept.acknowledge, done)
            fleet.acknowledged -= done
        if revision is None:
            return
        evidence, shown = await asyncio.to_thread(self._read, fleet.book.list())
        if fleet.desired is revision:
            fleet.evidence = shown
            self._metrics.show_evidence(shown)
        if evidence.problems and evidence.problems != self._problems:
            _log.warning("evidence was left out: %s", "; ".join(evidence.problems[:3]))
        self._problems = evidence.problems
        await self._guard.judge(revision, evidence)

    def _read(self, reported: list[tuple[str, evidence_pb2.Evidence]]) -> tuple[Evidence, list[evidence_pb2.TierEvidence]]:
        evidence, desired, rollout = pool(reported), self._fleet.desired, self._changes.rollout
        stable = get_guard_confidence(desired.policy) if desired else 0.99
        candidate = rollout.limit_confidence if rollout else stable
        return evidence, to_tier_evidence(evidence, stable, candidate)
