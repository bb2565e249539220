"""Roll-outs as the database keeps them: their terms, their state, and what each change of state needs.

    start -> progressing -> progressing (next share) -> ... -> promoted
                  |  ^                                            ^
                  v  |--- resume                                  |--- by an operator, from either state
                paused ------------------------------------> aborted

A row holds all that a restarted service needs to go on. Whoever decides on a change is elsewhere: operators (rollout_servicer.py), the
analysis (rollout_driver.py), a new revision of the policy (changes.py). Called from worker threads.
"""

from __future__ import annotations

import builtins
import dataclasses
import datetime
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from sedac.contract import wire
from sedac.contract.v1 import rollouts_pb2
from sedac.control.base.database import Database
from sedac.control.fleet.fleet import Candidate
from sedac.errors import RequestIdReused, RolloutConflict, RolloutNotFound, StaleEtag
from sedac.policy.model import Policy

State = Literal["progressing", "paused", "promoted", "aborted"]
STATES: dict[State, rollouts_pb2.RolloutState] = {
    "progressing": rollouts_pb2.ROLLOUT_STATE_PROGRESSING,
    "paused": rollouts_pb2.ROLLOUT_STATE_PAUSED,
    "promoted": rollouts_pb2.ROLLOUT_STATE_PROMOTED,
    "aborted": rollouts_pb2.ROLLOUT_STATE_ABORTED,
}
_UNDER_WAY = ("progressing", "paused")
_REQUEST_LIFE_SECONDS = 24 * 3600.0


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What the candidate must not pass; None: not asked for."""

    max_mismatch: float | None = None
    """of its audited answers, 0 to 1"""
    max_nll_difference: float | None = None
    """of its audited answers, nats per token, 0 to 1"""
    max_latency_ratio: float | None = None
    """of its seconds per token to those of the policy in force, over 0"""
    max_error_share: float | None = None
    """of its finished requests, 0 to 1"""
    confidence: float = 0.95
    """that no bound is taken for passed that is not, over the whole roll-out; 0.5 to below 1"""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What had been counted before, so that what came since can be told."""

    num_finished: int = 0
    """of the candidate, when the step began"""
    num_mismatch: int = 0
    num_nll_difference: int = 0
    stable_token_seconds: tuple[int, float, float] = (0, 0.0, 0.0)
    """of the policy in force, when the roll-out began: count, sum, sum of squares"""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One roll-out."""

    number: int
    policy: Policy
    base_revision: int
    shares: tuple[float, ...]
    interval_seconds: float
    min_requests: int
    bounds: Bounds
    author: str
    comment: str
    state: State = "progressing"
    step: int = 0
    attempt: int = 0
    """grows when it is resumed, so that engines that refused it are asked again"""
    reason: str = ""
    promoted_revision: int = 0
    engines: tuple[str, ...] = ()
    """those that must be heard of in the analysis"""
    baseline: Baseline = field(default_factory=Baseline)
    created: float = 0.0
    """seconds since the epoch"""
    updated: float = 0.0
    version: int = 0
    evidence: bytes = b""
    """of both arms at the last analysis, as a serialized message `Rollout` that holds nothing else"""

    @property
    def name(self) -> str:
        """Its name in the contract."""
        return f"rollouts/{self.number}"

    @property
    def etag(self) -> str:
        """Changes with every version."""
        return hashlib.sha256(f"{self.number}:{self.version}".encode()).hexdigest()[:16]

    @property
    def share(self) -> float:
        """Share of the requests in its step; 0 once it is over."""
        return self.shares[self.step] if self.is_under_way else 0.0

    @property
    def is_under_way(self) -> bool:
        """Whether the candidate serves requests as a candidate."""
        return self.state in _UNDER_WAY

    @property
    def candidate(self) -> Candidate | None:
        """What engines are pushed; None once it is over."""
        if not self.is_under_way:
            return None
        return Candidate(rollout=self.number, policy=self.policy, share=self.share, attempt=self.attempt)

    def to_proto(self) -> rollouts_pb2.Rollout:
        """Write it as the contract shows it."""
        message = rollouts_pb2.Rollout.FromString(self.evidence)
        for name in ("name", "number", "base_revision", "step", "interval_seconds", "min_requests", "reason", "author", "comment", "etag"):
            setattr(message, name, getattr(self, name))
        message.state, message.promoted_revision = STATES[self.state], self.promoted_revision
        message.policy.CopyFrom(wire.policy_to_proto(self.policy))
        message.shares.extend(self.shares)
        message.bounds.CopyFrom(rollouts_pb2.RolloutBounds(**vars(self.bounds)))
        message.create_time.FromDatetime(datetime.datetime.fromtimestamp(self.created, datetime.UTC))
        message.update_time.FromDatetime(datetime.datetime.fromtimestamp(self.updated, datetime.UTC))
        return message

    def end(self, state: Literal["promoted", "aborted"], reason: str, *, promoted_revision: int = 0) -> Rollout:
        """Return it over.

        Raises:
            RolloutConflict: it is over already.
        """
        self._check("under way", self.is_under_way)
        return dataclasses.replace(self, state=state, reason=reason, promoted_revision=promoted_revision)

    def pause(self, reason: str) -> Rollout:
        """Return it paused.

        Raises:
            RolloutConflict: it is not progressing.
        """
        self._check("progressing", self.state == "progressing")
        return dataclasses.replace(self, state="paused", reason=reason)

    def resume(self, reason: str, engines: tuple[str, ...]) -> Rollout:
        """Return it progressing again, from the same share.

        Raises:
            RolloutConflict: it is not paused.
        """
        self._check("paused", self.state == "paused")
        return dataclasses.replace(self, state="progressing", reason=reason, attempt=self.attempt + 1, engines=engines)

    def advance(self, reason: str, engines: tuple[str, ...], baseline: Baseline) -> Rollout:
        """Return it at its next share, which must exist."""
        assert self.state == "progressing"
        assert self.step + 1 < len(self.shares)
        return dataclasses.replace(self, step=self.step + 1, reason=reason, engines=engines, baseline=baseline)

    def check_etag(self, etag: str) -> None:
        """Check a guard that came with a change; empty: none.

        Raises:
            StaleEtag: it changed since it was read.
        """
        if etag and etag != self.etag:
            raise StaleEtag(f"etag {etag[:40]!r} is not {self.name}'s ({self.etag!r}, {self.state}); read it again and retry")

    def _check(self, wanted: str, found: bool) -> None:
        if not found:
            raise RolloutConflict(f"{self.name} is {self.state}, not {wanted}" + (f": {self.reason}" if self.reason else ""))


class RolloutStore:
    """The roll-outs of one database; see the module's docstring."""

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
