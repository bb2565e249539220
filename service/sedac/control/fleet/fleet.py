"""The fleet: every engine that the control service has heard of since it started, what each one should run and what it runs.

Lives on the event loop; the servicers write, watchers wait for the next version. A slow watcher misses versions and a slow
engine misses revisions; neither holds anyone up. It never touches the store. What one engine says costs the same in a fleet of
one and of a thousand; a new revision concerns every engine once.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from google.rpc import status_pb2

from sedac.contract import wire
from sedac.contract.v1 import control_pb2, evidence_pb2, rollouts_pb2
from sedac.control.base.metrics import STATES, ControlMetrics
from sedac.control.fleet.pooling import EvidenceBook
from sedac.control.policy.store import Revision
from sedac.errors import FieldViolation, PolicyInvalid
from sedac.policy.check import validate
from sedac.policy.layout import Layout, ProbeSetSummary
from sedac.policy.model import Policy

_FORGET_AFTER = datetime.timedelta(days=1)
_MAX_GONE = 1024
"""engines that are not connected any more and still remembered; beyond that the oldest are forgotten"""


class Target(NamedTuple):
    """What an engine should run; whatever changes in it is pushed."""

    revision: int = 0
    rollout: int = 0
    """whose candidate runs beside the policy; 0: none"""
    share: float = 0.0
    attempt: int = 0
    """grows when the same is to be pushed again"""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A roll-out's policy and its share of the requests."""

    rollout: int
    policy: Policy
    share: float
    attempt: int = 0

    def to_proto(self) -> control_pb2.Canary:
        """Write it as engines are pushed it."""
        return control_pb2.Canary(rollout=self.rollout, policy=wire.policy_to_proto(self.policy), share=self.share)


@dataclass(kw_only=True, eq=False)
class Engine:
    """One connection of an engine, and what it last said."""

    hello: control_pb2.EngineHello
    active_revision: int
    peer: str = ""
    connected: bool = True
    active_rollout: int = 0
    answered: Target = field(default_factory=Target)
    """the newest push that this connection answered"""
    error: status_pb2.Status | None = None
    """the NACK, where that answer was one"""
    report: control_pb2.EngineReport = field(default_factory=control_pb2.EngineReport)
    reported: float = field(default_factory=time.monotonic)
    """seconds on the monotonic clock at which the newest report came; before the first: the start of the connection"""
    last_seen: datetime.datetime = field(default_factory=lambda: datetime.datetime.now(datetime.UTC))
    shown_state: control_pb2.EngineState | None = None
    """the state under which the metrics count the engine; None: not counted"""
    version: int = 0
    """the fleet's version when anything but counters last changed here"""
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    """set when the connection's task should look again: a new policy, an answer, the end"""

    @property
    def id(self) -> str:
        """The engine's name, stable over reconnects."""
        return self.hello.engine_id

    @property
    def layout(self) -> Layout:
        """What the engine has attached."""
        return wire.layout_from_hello(self.hello)

    def find_state(self, target: Target) -> control_pb2.EngineState:
        """Return the state that follows from what was pushed and answered."""
        if not self.connected:
            return control_pb2.ENGINE_STATE_STALE
        if self.answered != target:
            return control_pb2.ENGINE_STATE_PENDING
        return control_pb2.ENGINE_STATE_NACKED if self.error else control_pb2.ENGINE_STATE_SYNCED

    def to_status(self, target: Target) -> control_pb2.EngineStatus:
        """Write the engine's part of a status message."""
        state = self.find_state(target)
        status = control_pb2.EngineStatus(
            engine=self.hello,
            state=state,
            desired_revision=target.revision,
            active_revision=self.active_revision,
            active_rollout=self.active_rollout,
            error=self.error if state == control_pb2.ENGINE_STATE_NACKED else None,
            report=self.report,
        )
        status.last_seen_time.FromDatetime(self.last_seen)
        return status

    def touch(self) -> None:
        """Note that the engine was heard of."""
        self.last_seen = datetime.datetime.now(datetime.UTC)


class Fleet:
    """All engines by id, the revision they should run, and the version that watchers wait for."""

    def __init__(self, metrics: ControlMetrics) -> None:
        self.engines: dict[str, Engine] = {}
        self.desired: Revision | None = None
        self.candidate: Candidate | None = None
        self.book = EvidenceBook()
        self.rollout: rollouts_pb2.Rollout | None = None
        """the one under way, or the newest, as the status shows it; its evidence too"""
        self.evidence: list[evidence_pb2.TierEvidence] = []
        """as the status shows it"""
        self.guard: control_pb2.Guard | None = None
        self.acknowledged: set[int] = set()
        """revisions that an engine has put in force since somebody last took them from here"""
        self.reported = asyncio.Event()
        """set when an engine's evidence is new or a revision was acknowledged"""
        self.probe_sets: Mapping[str, ProbeSetSummary] = {}
        """uploaded, by name; policies may name them"""
        self.deleted_probe_sets: Mapping[str, str] = {}
        """digests of those that are gone, by name"""
        self.closing = False
        self._version = 0
        self._counts = dict.fromkeys(STATES, 0)
        self._changed = asyncio.Event()
        self._announced = asyncio.Event()
        self._metrics = metrics

    def set_desired(self, revision: Revision | None) -> None:
        """Announce a stored revision to every engine and watcher; one older than the last announced is ignored."""
        if revision is None or (self.desired and self.desired.revision >= revision.revision):
            return
        self.desired = revision
        self._expect()
        self._wake_engines()
        self._announced.set()
        self._announced = asyncio.Event()

    def set_candidate(self, candidate: Candidate | None) -> None:
        """Announce what runs beside the policy; with `set_desired` before or after it, without an await between, one push."""
        self.candidate = candidate
        self._expect()
        self._wake_engines()

    def _expect(self) -> None:
        desired, candidate = self.desired, self.candidate
        self.book.expect(
            desired.revision if desired else 0,
            desired.policy if desired else None,
            candidate.rollout if candidate else 0,
            candidate.policy if candidate else None,
        )

    @property
    def target(self) -> Target:
        """What every engine should run."""
        revision, candidate = self._get_desired(), self.candidate
        return Target(revision, candidate.rollout, candidate.share, candidate.attempt) if candidate else Target(revision)

    def take_report(self, engine: Engine, report: control_pb2.EngineReport) -> None:
        """Note what an engine measured; a replaced connection is not heard."""
        if self.is_replaced(engine):
            return
        engine.report, engine.reported = report, time.monotonic()
        if self.book.take(engine.id, report.evidence):
            self.reported.set()

    def note_acknowledged(self, revision: int) -> None:
        """Note that an engine has put a revision in force."""
        self.acknowledged.add(revision)
        self.reported.set()

    def join(self, hello: control_pb2.EngineHello, peer: str) -> tuple[Engine, Engine | None]:
        """Register a new connection of an engine; returns it and the live one of the same id that it replaces."""
        self.forget()
        before = self.engines.get(hello.engine_id)
        engine = Engine(hello=hello, active_revision=hello.active_revision, peer=peer)
        if before is not None:
            self._count(before, None)
        self.engines[engine.id] = engine
        self.notify(engine)
        if before is None or not before.connected:
            return engine, None
        before.wake.set()  # no longer among the engines, so nobody else wakes it
        return engine, before

    def leave(self, engine: Engine) -> None:
        """Mark a lost connection's engine STALE; where a newer connection took over, nothing changes."""
        engine.connected = False
        self.notify(engine)

    def forget(self) -> None:
        """Drop the engines that were not heard of for a day, and the oldest of too many that are gone."""
        long_ago = datetime.datetime.now(datetime.UTC) - _FORGET_AFTER
        gone = sorted((e for e in self.engines.values() if not e.connected), key=lambda e: e.last_seen)
        num_over = len(gone) - _MAX_GONE
        for engine in [e for i, e in enumerate(gone) if i < num_over or e.last_seen <= long_ago]:
            self._count(engine, None)
            del self.engines[engine.id]
            self._show()

    def is_replaced(self, engine: Engine) -> bool:
        """Whether a newer connection of the same engine took over."""
        return self.engines.get(engine.id) is not engine

    def close(self) -> None:
        """Tell every stream to end."""
        self.closing = True
        self.reported.set()
        self._wake_engines()
        self._announced.set()

    def notify(self, *changed: Engine) -> None:
        """Show in the metrics that these engines changed, and wake the watchers; a replaced connection's engine is none any more."""
        for engine in changed:
            if not self.is_replaced(engine):
                self._count(engine, engine.find_state(self.target))
                engine.version = self._version + 1
        self._show()

    def _count(self, engine: Engine, state: control_pb2.EngineState | None) -> None:
        for old_or_new, step in ((engine.shown_state, -1), (state, 1)):
            if old_or_new is not None:
                self._counts[old_or_new] += step
        engine.shown_state = state

    def _show(self) -> None:
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()
        self._metrics.show_fleet(self._get_desired(), {STATES[state]: count for state, count in self._counts.items()})

    def _get_desired(self) -> int:
        return self.desired.revision if self.desired else 0

    def _wake_engines(self) -> None:
        for engine in self.engines.values():
            engine.wake.set()
        self.notify(*self.engines.values())

    async def wait(self, seen: int, timeout_seconds: float) -> int:
        """Return the version once it is newer than `seen`, or after the timeout."""
        if self._version == seen:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_seconds):
                    await self._changed.wait()
        return self._version

    async def wait_for_revision(self, revision: int) -> None:
        """Return once a revision from this one on is announced, or the service is stopping."""
        while not self.closing and self._get_desired() < revision:
            await self._announced.wait()

    def list_engines(self) -> list[Engine]:
        """Return every engine that was heard of within a day, by id."""
        self.forget()
        return [engine for _, engine in sorted(self.engines.items())]

    def describe(self, engine: Engine) -> control_pb2.EngineStatus:
        """Write one engine's state."""
        return engine.to_status(self.target)

    def to_status(self) -> control_pb2.Status:
        """Write the desired policy and every engine's state."""
        desired = self.desired
        engines = [self.describe(engine) for engine in self.list_engines()]
        if desired is None:
            return control_pb2.Status(engines=engines)
        certified = desired.policy.certificate is not None
        certification = control_pb2.CERTIFICATION_CERTIFIED if certified else control_pb2.CERTIFICATION_UNCERTIFIED
        return control_pb2.Status(
            policy=desired.to_proto(),
            engines=engines,
            certification=certification,
            rollout=self.rollout,
            evidence=self.evidence,
            guard=self.guard,
        )

    def check(self, policy: Policy) -> None:
        """Check a policy against every connected engine, as far as the policy in force fits it.

        What an engine refuses of the policy in force already is no reason to refuse a change: one engine that doesn't fit
        must not keep the others from being switched off.

        Raises:
            PolicyInvalid: with every field at fault, and the engines that it doesn't fit.
        """
        found: dict[FieldViolation, list[str]] = {}
        layouts = {engine.id: engine.layout for engine in list(self.engines.values()) if engine.connected}  # also called from other threads
        for engine_id, layout in layouts.items():
            known = _violations(self.desired.policy, layout, self.probe_sets) if self.desired else set()
            for violation in sorted(_violations(policy, layout, self.probe_sets) - known, key=str):
                found.setdefault(violation, []).append(engine_id)
        bad = [FieldViolation(v.field, f"{v.description} (engine {_name(ids)})") for v, ids in found.items()]
        name, gone = policy.probe_set, self.deleted_probe_sets.get(policy.probe_set)
        is_new = self.desired is None or self.desired.policy.probe_set != name
        if gone and is_new and not any(layout.probe_set == name for layout in layouts.values()):
            bad = [v for v in bad if v.field != "probe_set"]
            bad.append(FieldViolation("probe_set", f"{name!r} was deleted; upload it again (sha256 {gone[:12]}...), or name another set"))
        if bad:
            raise PolicyInvalid(bad)

    def find_references(self, *policies: Policy) -> list[control_pb2.ProbeSetReference]:
        """Return where engines find the uploaded sets that policies name."""
        named = {policy.probe_set: self.probe_sets[policy.probe_set] for policy in policies if policy.probe_set in self.probe_sets}
        return [control_pb2.ProbeSetReference(name=name, sha256=found.sha256, size_bytes=found.size_bytes) for name, found in named.items()]


def _violations(policy: Policy, layout: Layout, available: Mapping[str, ProbeSetSummary]) -> set[FieldViolation]:
    try:
        validate(policy, layout, available)
    except PolicyInvalid as refused:
        return set(refused.violations)
    return set()


def _name(ids: list[str]) -> str:
    return ids[0] if len(ids) == 1 else f"{ids[0]} and {len(ids) - 1} more"
