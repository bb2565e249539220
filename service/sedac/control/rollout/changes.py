"""The one way by which the policy in force and a roll-out change: stored as one act with its audit entry, then announced as one.

Operators, the analysis of a roll-out and the guard all come through here, one at a time under `lock`. A new revision ends the roll-out
that is under way, because its evidence is about another policy beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from sedac.control.access.audit_log import AuditLogStore
from sedac.control.access.auth import Caller
from sedac.control.base.database import Database
from sedac.control.fleet.fleet import Fleet
from sedac.control.revisions.store import Revision, Store
from sedac.control.rollout.metrics import RolloutMetrics
from sedac.control.rollout.rollout import Rollout
from sedac.control.rollout.store import RolloutStore
from sedac.policy.check import validate
from sedac.policy.model import Policy

ROLLOUT = Caller(principal="rollout", author="rollout", peer="")
GUARD = Caller(principal="guard", author="guard", peer="")


class Changes:
    """What is in force, changed as one; every method but `check` wants `lock` held."""

    def __init__(
        self, database: Database, store: Store, rollouts: RolloutStore, audit_log: AuditLogStore, fleet: Fleet, metrics: RolloutMetrics
    ) -> None:
        self.lock = asyncio.Lock()
        self.rollout: Rollout | None = None
        """The roll-out under way, or the newest; None: there was none yet."""
        self._db, self._store, self._rollouts, self._audit_log, self._fleet, self._metrics = database, store, rollouts, audit_log, fleet, metrics

    def restore(self) -> None:
        """Announce what the database holds, at the start.

        Raises:
            StoreFailed: the database can't be read.
        """
        self._fleet.set_desired(self._store.find_newest())
        self._announce(self._rollouts.find_newest())

    def check(self, policy: Policy) -> None:
        """Check a policy by itself and against the connected engines.

        Raises:
            PolicyInvalid: with every field at fault.
        """
        validate(policy)
        self._fleet.check(policy)

    async def append(
        self,
        policy: Policy,
        *,
        action: str,
        caller: Caller,
        comment: str = "",
        promoted: Rollout | None = None,
        note: Callable[[Revision], None] = lambda _: None,
        **more: Any,
    ) -> Revision:
        """Store a new revision and announce it; `more` goes to `Store.append`, which says what it raises.

        It ends the roll-out that is under way: as promoted where that is `promoted`, which holds the reason, else as aborted.
        `note` writes what else belongs to the same transaction.
        """
        made, ended = await asyncio.to_thread(self._append, policy, action, caller, comment, promoted, note, more)
        self._fleet.set_desired(made)
        if ended:
            self._announce(ended)
        return made

    def _append(
        self,
        policy: Policy,
        action: str,
        caller: Caller,
        comment: str,
        promoted: Rollout | None,
        note: Callable[[Revision], None],
        more: dict[str, Any],
    ) -> tuple[Revision, Rollout | None]:
        with self._db.transaction():
            before = self._store.find_newest()
            made = self._store.append_audited(self._audit_log, policy, action=action, caller=caller, comment=comment, **more)
            ended, running = None, self._rollouts.find_newest()
            if before and made.revision == before.revision + 1 and running and running.is_under_way:
                why = f"revision {made.revision} by {made.author} replaced revision {running.base_revision}, beside which it ran"
                over = promoted.end("promoted", promoted.reason, promoted_revision=made.revision) if promoted else running.end("aborted", why)
                ended = self._save(running, over, action if promoted else "AbortRollout", caller, over.reason)
            note(made)
            return made, ended

    async def start_rollout(self, caller: Caller, comment: str, **terms: Any) -> Rollout:
        """Store a new roll-out and announce it; `terms` go to `RolloutStore.start`, which says what it raises."""
        made = await asyncio.to_thread(self._start_rollout, caller, comment, terms)
        self._announce(made)
        return made

    def _start_rollout(self, caller: Caller, comment: str, terms: dict[str, Any]) -> Rollout:
        with self._db.transaction():
            made = self._rollouts.start(author=caller.author, comment=comment, **terms)
            self._audit_log.append("StartRollout", made.name, None, made.to_proto(), comment, caller=caller)
            return made

    async def change_rollout(self, before: Rollout, after: Rollout, action: str, caller: Caller, comment: str = "") -> Rollout:
        """Store a roll-out's next state and announce it.

        Raises:
            StoreFailed: nothing was stored, for want of space or a working disk.
        """
        made = await asyncio.to_thread(self._save, before, after, action, caller, comment)
        self._announce(made)
        return made

    def _save(self, before: Rollout, after: Rollout, action: str, caller: Caller, comment: str) -> Rollout:
        with self._db.transaction():
            saved = self._rollouts.save(after)
            self._audit_log.append(action, saved.name, before.to_proto(), saved.to_proto(), comment, caller=caller)
            return saved

    def _announce(self, rollout: Rollout | None) -> None:
        self.rollout = rollout
        if rollout is not None:
            self._fleet.rollout = rollout.to_proto()
            self._fleet.set_candidate(rollout.candidate, rollout.attempt)
            self._metrics.show_rollout(rollout.state, rollout.share)
