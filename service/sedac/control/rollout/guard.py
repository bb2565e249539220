"""The guard: takes a policy out of force when the audits of its own answers show that it loses more than the operator allows.

It goes back to the knobs of the last good revision: the newest earlier one that an engine had in force and whose knobs it never
condemned; where there is none, or `audit.action` says so, to the same policy not enabled. The audit settings in force stay: they say what
the operator asks for, not what is computed. Verdicts are kept, so that condemned knobs never come back by its hand, and no revision is
judged twice.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import json
import logging
from collections.abc import Callable

from sedac.contract.v1 import control_pb2
from sedac.control.base.database import Database
from sedac.control.fleet.fleet import Fleet
from sedac.control.fleet.pooling import STABLE, Evidence
from sedac.control.revisions.store import Revision, Store
from sedac.control.rollout.bounds import Bounds
from sedac.control.rollout.changes import GUARD, Changes
from sedac.control.rollout.judge import judge
from sedac.control.rollout.metrics import RolloutMetrics
from sedac.errors import PolicyInvalid
from sedac.policy.model import Audit, GuardAction, Policy

_log = logging.getLogger(__name__)
_PAGE = 100


class GuardStore:
    """Which revisions engines had in force, and which were condemned."""

    def __init__(self, database: Database, *, now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC)) -> None:
        """Use an open database."""
        self._db, self._now = database, now

    def acknowledge(self, revisions: set[int]) -> None:
        """Note that an engine had these in force.

        Raises:
            StoreFailed: nothing was stored, for want of space or a working disk.
        """
        with self._db.transaction():
            for revision in revisions:
                self._db.execute("INSERT OR IGNORE INTO acknowledged VALUES (?)", (revision,))

    def condemn(self, revision: Revision, made: int, reason: str) -> None:
        """Keep a verdict: `revision` was taken out of force, and `made` is in its place.

        Raises:
            StoreFailed: nothing was stored, for want of space or a working disk.
        """
        values = (revision.revision, get_knobs(revision.policy), made, reason, self._now().timestamp())
        self._db.execute("INSERT INTO guard_verdicts VALUES (?, ?, ?, ?, ?)", values)

    def find_newest(self) -> control_pb2.Guard | None:
        """Return what the guard last did; None: it never had to."""
        with self._db.reading():
            row = self._db.execute("SELECT revision, made, reason, time FROM guard_verdicts ORDER BY made DESC LIMIT 1").fetchone()
        if row is None:
            return None
        guard = control_pb2.Guard(refused_revision=row[0], revision=row[1], reason=row[2])
        guard.act_time.FromDatetime(datetime.datetime.fromtimestamp(row[3], datetime.UTC))
        return guard

    def is_condemned(self, revision: int) -> bool:
        """Whether the guard took this very revision out of force."""
        with self._db.reading():
            return self._db.execute("SELECT 1 FROM guard_verdicts WHERE revision = ?", (revision,)).fetchone() is not None

    def find_good(self, store: Store, before: Revision) -> list[Revision]:
        """Return the earlier revisions that were in force in an engine, with other knobs than `before` and all that was condemned."""
        with self._db.reading():
            condemned = {row[0] for row in self._db.execute("SELECT knobs FROM guard_verdicts")} | {get_knobs(before.policy)}
            acknowledged = {row[0] for row in self._db.execute("SELECT revision FROM acknowledged WHERE revision < ?", (before.revision,))}
            found: list[Revision] = []
            newer, page = before.revision, store.list(before=before.revision, limit=_PAGE)
            while page:
                found += [r for r in page if r.revision in acknowledged and get_knobs(r.policy) not in condemned]
                newer = page[-1].revision
                page = store.list(before=newer, limit=_PAGE)
            return found

    def list_needed(self, store: Store) -> set[int]:
        """Return the revisions that must outlive compaction: the last good one."""
        newest = store.find_newest()
        good = self.find_good(store, newest) if newest else []
        return {good[0].revision} if good else set()


class Guard:
    """Judges the stable side's evidence, and acts."""

    def __init__(self, kept: GuardStore, store: Store, changes: Changes, fleet: Fleet, metrics: RolloutMetrics) -> None:
        self._kept, self._store, self._changes, self._fleet, self._metrics = kept, store, changes, fleet, metrics

    async def judge(self, revision: Revision, evidence: Evidence) -> None:
        """Act where `evidence`, which was gathered while `revision` was in force, shows more loss than its policy allows.

        Raises:
            StoreFailed: nothing was stored, for want of space or a working disk; the next evidence tries again.
        """
        reason = await asyncio.to_thread(find_excess, evidence, revision.policy)
        if not reason:
            return
        async with self._changes.lock:
            is_in_force = self._fleet.desired is not None and self._fleet.desired.revision == revision.revision
            if is_in_force and not await asyncio.to_thread(self._kept.is_condemned, revision.revision):
                await self._act(revision, reason)

    async def _act(self, bad: Revision, reason: str) -> None:
        action, policy, comment = await asyncio.to_thread(self._choose, bad)
        comment = f"guard: {reason}; {comment}"
        made = await self._changes.append(
            policy, action="Guard", caller=GUARD, comment=comment, note=lambda made: self._kept.condemn(bad, made.revision, comment)
        )
        self._fleet.guard = await asyncio.to_thread(self._kept.find_newest)
        self._fleet.notify()
        self._metrics.guard_actions.labels(action).inc()
        _log.warning("the guard took revision %d out of force and made revision %d: %s", bad.revision, made.revision, comment)

    def _choose(self, bad: Revision) -> tuple[GuardAction, Policy, str]:
        """Return what to do, the policy to put in force, and why that one."""
        exact = dataclasses.replace(bad.policy, enabled=False)
        if bad.policy.audit.action == "exact":
            return "exact", exact, "exact, as audit.action says"
        for good in self._kept.find_good(self._store, bad):
            policy = dataclasses.replace(good.policy, audit=bad.policy.audit)
            try:
                self._changes.check(policy)
            except PolicyInvalid as error:
                _log.warning("revision %d was good but no longer fits: %s", good.revision, error)
                continue
            return "rollback", policy, f"back to revision {good.revision}, the last good one"
        return "exact", exact, "exact, because no earlier revision is known to be good"


def get_knobs(policy: Policy) -> str:
    """Return all of a policy that decides what is computed, in a form that compares."""
    data = dataclasses.replace(policy, audit=Audit(), certificate=None).to_dict()
    return json.dumps(data, sort_keys=True)


def get_guard_confidence(policy: Policy) -> float:
    """Return the confidence of each limit, so that all that are held against this policy's bounds hold together at `audit.confidence`."""
    return Bounds.of_audit(policy.audit).get_limit_confidence(policy, together=False)


def find_excess(evidence: Evidence, policy: Policy) -> str:
    """Return which tier of the policy in force loses more than its audit allows; empty: none is known to."""
    verdict = judge(evidence, Bounds.of_audit(policy.audit), get_guard_confidence(policy), side=STABLE, together=False)
    return verdict.reason if verdict.kind == "breach" else ""
