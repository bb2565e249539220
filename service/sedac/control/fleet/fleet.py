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

from sedac import __version__
from sedac.contract.v1 import control_pb2, evidence_pb2, rollouts_pb2
from sedac.control.base.metrics import STATES, ControlMetrics
from sedac.control.fleet.engine import Engine, Target
from sedac.control.fleet.fitting import NamedProbeSets, check_fit
from sedac.control.fleet.pooling import EvidenceBook
from sedac.control.revisions.store import Revision
from sedac.policy.model import Candidate, Policy
from sedac.versions import CAPABILITIES

_FORGET_AFTER = datetime.timedelta(days=1)
_MAX_GONE = 1024
"""How many engines that are not connected any more are remembered; beyond that the oldest are forgotten."""


class Fleet:
    """All engines by id, the revision they should run, and the version that watchers wait for."""

    def __init__(self, metrics: ControlMetrics) -> None:
        self.engines: dict[str, Engine] = {}
        self.desired: Revision | None = None
        self.candidate: Candidate | None = None
        """The policy on trial beside the one in force, where a roll-out is under way."""
        self._attempt = 0
        self.book = EvidenceBook()
        self.rollout: rollouts_pb2.Rollout | None = None
        """The roll-out under way, or the newest, as the status shows it, with its evidence."""
        self.evidence: list[evidence_pb2.TierEvidence] = []
        """What is measured of the policies in force, as the status shows it."""
        self.guard: control_pb2.Guard | None = None
        self.acknowledged: set[int] = set()
        """The revisions that an engine has put in force since somebody last took them from here."""
        self.reported = asyncio.Event()
        """Set when an engine's evidence is new or a revision was acknowledged."""
        self.probe_sets = NamedProbeSets()
        """The uploaded probe sets, which policies may name."""
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

    def set_candidate(self, candidate: Candidate | None, attempt: int = 0) -> None:
        """Announce what runs beside the policy; with `set_desired` before or after it, without an await between, one push.

        Args:
            candidate: None: nothing.
            attempt: grows when the same candidate is to be pushed again.
        """
        self.candidate, self._attempt = candidate, attempt
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
        return Target(revision, candidate.rollout, candidate.share, self._attempt) if candidate else Target(revision)

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
            return control_pb2.Status(engines=engines, version=__version__, capabilities=CAPABILITIES)
        certified = desired.policy.certificate is not None
        certification = control_pb2.CERTIFICATION_CERTIFIED if certified else control_pb2.CERTIFICATION_UNCERTIFIED
        return control_pb2.Status(
            policy=desired.to_proto(),
            engines=engines,
            certification=certification,
            rollout=self.rollout,
            evidence=self.evidence,
            guard=self.guard,
            version=__version__,
            capabilities=CAPABILITIES,
        )

    def check(self, policy: Policy) -> None:
        """Check a policy against every connected engine, as far as the policy in force fits it; from any thread.

        Raises:
            PolicyInvalid: with every field at fault, and the engines that it doesn't fit.
        """
        layouts = {engine.id: engine.layout for engine in list(self.engines.values()) if engine.connected}
        check_fit(policy, self.desired.policy if self.desired else None, layouts, self.probe_sets)
