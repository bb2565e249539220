"""The store of roll-outs: a row holds all that a restarted service needs to go on. Called from worker threads."""

from __future__ import annotations

import builtins
import dataclasses
import datetime
import json
from collections.abc import Callable
from typing import Any

from sedac.control.base.database import Database
from sedac.control.rollout.bounds import Baseline, Bounds
from sedac.control.rollout.rollout import Rollout, State
from sedac.errors import RequestIdReused, RolloutConflict, RolloutNotFound
from sedac.policy.model import Policy

_REQUEST_LIFE_SECONDS = 24 * 3600.0


class RolloutStore:
    """The roll-outs of one database."""

    def __init__(self, database: Database, *, now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC)) -> None:
        """Use an open database."""
        self._db, self._now = database, now

    def find_newest(self) -> Rollout | None:
        """Return the one under way, or the newest; there is never a newer one than the one under way. None before the first."""
        return next(iter(self.list(before=None, limit=1)), None)

    def get(self, number: int) -> Rollout:
        """Return one.

        Raises:
            RolloutNotFound: there is no such roll-out.
        """
        found = next(iter(self.list(before=number + 1, limit=1)), None)
        if found is None or found.number != number:
            newest = self.find_newest()
            raise RolloutNotFound(f"rollouts/{number} does not exist; the newest is {newest.name if newest else 'none yet'}: list them first")
        return found

    def list(self, *, before: int | None, limit: int) -> builtins.list[Rollout]:
        """Return at most `limit` that are older than number `before` (None: from the newest), newest first."""
        with self._db.reading():
            rows = self._db.execute(
                "SELECT number, version, state, body, evidence FROM rollouts WHERE number < ? ORDER BY number DESC LIMIT ?",
                (1 << 62 if before is None else before, limit),
            )
            return [_read(row) for row in rows]

    def find_request(self, request_id: str, fingerprint: str) -> Rollout | None:
        """Return the roll-out that a request started within a day; None where there was no such request.

        Raises:
            RequestIdReused: the request of that id was another one.
        """
        with self._db.reading():
            oldest = self._now().timestamp() - _REQUEST_LIFE_SECONDS
            query = "SELECT fingerprint, number FROM rollout_requests WHERE request_id = ? AND created > ?"
            seen = self._db.execute(query, (request_id, oldest)).fetchone()
        if seen is None:
            return None
        if seen[0] != fingerprint:
            raise RequestIdReused(f"request_id {request_id!r} started rollouts/{seen[1]} from another request; send a new one, or none")
        return self.get(seen[1])

    def start(self, *, request_id: str = "", fingerprint: str = "", **terms: Any) -> Rollout:
        """Store a new one and return it; `terms` are fields of `Rollout`.

        Raises:
            RolloutConflict: another is under way.
            StoreFailed: nothing was stored, for want of space or a working disk.
        """
        with self._db.transaction():
            newest = self.find_newest()
            if newest and newest.is_under_way:
                raise RolloutConflict(f"{newest.name} is {newest.state} at {newest.share:.0%} of the requests; promote or abort it first")
            now = self._now().timestamp()
            made = self.save(Rollout(number=newest.number + 1 if newest else 1, created=now, **terms))
            if request_id:
                self._db.execute("DELETE FROM rollout_requests WHERE created <= ?", (now - _REQUEST_LIFE_SECONDS,))
                self._db.execute("INSERT INTO rollout_requests VALUES (?, ?, ?, ?)", (request_id, fingerprint, made.number, now))
            return made

    def save(self, changed: Rollout) -> Rollout:
        """Store a change and return it as stored, with its new etag; on disk when the outermost transaction ends.

        Raises:
            StoreFailed: nothing was stored, for want of space or a working disk.
        """
        saved = dataclasses.replace(changed, version=changed.version + 1, updated=self._now().timestamp())
        body = dataclasses.asdict(saved)
        evidence = body.pop("evidence")
        number, version, state = (body.pop(name) for name in ("number", "version", "state"))
        values = (number, version, state, json.dumps({**body, "policy": saved.policy.to_dict()}, sort_keys=True), evidence)
        with self._db.transaction():
            self._db.execute("INSERT OR REPLACE INTO rollouts (number, version, state, body, evidence) VALUES (?, ?, ?, ?, ?)", values)
        return saved


def _read(row: tuple[int, int, State, str, bytes]) -> Rollout:
    number, version, state, text, evidence = row
    body = json.loads(text)
    baseline = {**body["baseline"], "stable_token_seconds": tuple(body["baseline"]["stable_token_seconds"])}
    parts = {
        "policy": Policy.from_dict(body["policy"]),
        "bounds": Bounds(**body["bounds"]),
        "baseline": Baseline(**baseline),
        "shares": tuple(body["shares"]),
        "engines": tuple(body["engines"]),
    }
    return Rollout(number=number, version=version, state=state, evidence=evidence, **{**body, **parts})
