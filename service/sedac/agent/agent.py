"""The agent: keeps the engine at the control service's policy, and serving when that service is away.

Runs on the event loop of vLLM's API server. One task follows the discovery stream, one reads the workers' counters, one audits answers.
None is ever awaited by a request. The counters are read while there is something to read: each reading keeps vLLM's workers awake for a
second (distributed/device_communicators/shm_broadcast.py, 0.32: `busy_loop_s`), at the cost of a whole core.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from sedac.agent.audits import Auditor
from sedac.agent.engine import AttachedEngine, PartlyRefused
from sedac.agent.evidence import Book, open_book
from sedac.agent.following import Follower, Outcome
from sedac.agent.metrics import EngineMetrics
from sedac.agent.promise import Terms
from sedac.agent.pushes import Fetch, Orders, Preparation, ProbeSetSource
from sedac.contract import wire
from sedac.contract.stats import Stats
from sedac.contract.v1 import control_pb2
from sedac.errors import ConfigError, PolicyInvalid
from sedac.policy.check import validate
from sedac.policy.layout import Layout
from sedac.policy.model import Candidate, Policy
from sedac.settings import EngineSettings

_log = logging.getLogger(__name__)
_PREPARE_SECONDS = 180.0  # for fetching, verifying and preloading probe sets


@dataclass(kw_only=True)
class Agent:
    """One engine's link to the control service, and its counters' way into /metrics."""

    engine: AttachedEngine
    settings: EngineSettings
    layout: Layout
    metrics: EngineMetrics
    hello: control_pb2.EngineHello
    find_weights: Callable[[], str]
    """Returns the digest of the model's weights. It may take seconds and block, and raises ConfigError where the digest can't be known."""
    take_activity: Callable[[], bool] = lambda: True
    """Tells whether the engine has had anything to compute since the last call. By default it always may have had."""
    faster_rows: dict[str, int] = field(default_factory=dict)
    """Numbers of rows up to which reduced levels are faster than full on this machine. Empty where that is not measured."""
    auditor: Auditor | None = None
    """If None, no answers are audited."""
    policy: Policy = field(default_factory=Policy)
    revision: int = 0
    """Revision in force in every worker. 0 is the first policy, from the settings."""
    candidate: Candidate | None = None
    """Candidate in force beside the policy. None where there is none."""
    stats: Stats = field(default_factory=Stats)
    _is_behind: bool = True
    """Whether the workers may have counted more than the last reading told."""
    _is_bounded: bool = False
    _offer: Candidate | None = None
    """The candidate that requests may get now."""
    _books: dict[int, Book] = field(default_factory=dict)
    """Books by the number of their roll-out. 0 is the book of the policy in force."""
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _follower: Follower = field(init=False)
    _preparation: Preparation = field(init=False)

    def __post_init__(self) -> None:
        """Connect the parts."""
        self._preparation = Preparation(engine=self.engine)
        self._follower = Follower(
            address=self.settings.control_address,
            make_hello=self._make_hello,
            make_report=self._make_report,
            apply=self._follow_orders,
            find_outcome=lambda: Outcome(revision=self.revision, rollout=self._get_rollout()),
            make_fetch=ProbeSetSource(self.settings).open,
            report_seconds=max(self.settings.poll_seconds, 0.5),
            on_connected=lambda connected: self.metrics.set_connected(connected, time.time()),
            on_answered=lambda accepted, seconds: self.metrics.count_update(accepted=accepted, seconds=seconds),
        )

    @property
    def connected(self) -> bool:
        """Whether the control service is there."""
        return self._follower.connected

    @property
    def refusal(self) -> str:
        """Why the newest push was refused; empty once a push is applied."""
        return self._follower.refusal

    def get_terms(self) -> Terms:
        """Return what requests that arrive now are promised by: the policies in force, or nothing but exactness."""
        policy = self.policy if self._is_bounded else replace(self.policy, enabled=False)
        return Terms(policy=policy, levels=self.layout.levels, candidate=self._offer, can_audit=self.auditor is not None)

    def find_book(self, rollout: int) -> Book | None:
        """Return the evidence of a roll-out's candidate, or of the policy in force (0); None: it is not in force any more."""
        return self._books.get(rollout)

    async def start(self, first: Policy) -> None:
        """Put the first policy into force, then follow the control service in the background.

        Raises:
            PolicyInvalid: the first policy does not fit the model.
        """
        if first.certificate:
            await self._identify_weights()
        await self._apply(first, 0)
        self._tasks = [asyncio.create_task(self._poll(), name="sedac-poll")]
        if self.auditor:
            self._tasks.append(asyncio.create_task(self.auditor.run(), name="sedac-audit"))
        if self.settings.control_address:
            self._tasks.append(asyncio.create_task(self._follow(), name="sedac-follow"))

    async def join(self) -> None:
        """Wait until the control service's policy is applied or refused, so that no request is served under an older one.

        A service that says nothing within SEDAC_JOIN_SECONDS is served without.
        """
        if not self.settings.control_address or not self.settings.join_seconds:
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._follower.reached.wait(), self.settings.join_seconds)
            await asyncio.wait_for(self._follower.answered.wait(), 2 * _PREPARE_SECONDS)
            return
        why = "has not sent a policy" if not self._follower.reached.is_set() else "sent a policy that is not applied yet"
        _log.warning(
            "the control service at %s %s in time (SEDAC_JOIN_SECONDS=%g); serving under %s",
            self.settings.control_address,
            why,
            self.settings.join_seconds,
            "the first policy" if not self.revision else f"revision {self.revision}",
        )

    async def stop(self) -> None:
        """Stop following, polling and auditing."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def list_evidence(self) -> list[dict[str, Any]]:
        """Return the pages of all books as plain JSON types."""
        return [page for book in self._books.values() for page in book.to_dicts()]

    def _get_rollout(self) -> int:
        return self.candidate.rollout if self.candidate else 0

    async def _follow_orders(self, orders: Orders, fetch: Fetch) -> None:
        async def prepare() -> None:
            """Make ready what the orders need, within the time limit."""
            async with asyncio.timeout(_PREPARE_SECONDS):
                await self._preparation.prepare(orders, self.layout, fetch)

        await self._apply(orders.policy, orders.revision, orders.candidate, prepare)

    async def _apply(
        self, policy: Policy, revision: int, candidate: Candidate | None = None, prepare: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        with self._holding_back(policy, candidate):
            if prepare:
                await prepare()
            elif policy.certificate:
                validate(policy, self.layout)  # the workers check all but the certificate, for they don't know the weights
            await self._switch(policy, revision, candidate)
            self._preparation.note_applied()
            self.policy, self.revision, self.candidate = policy, revision, candidate
        books = [open_book(self._books.get(0), policy, revision=revision)]
        if candidate:
            books.append(open_book(self._books.get(candidate.rollout), candidate.policy, rollout=candidate.rollout))
        self._books = {book.rollout: book for book in books}
        self.metrics.set_policy(policy, revision, self.layout)
        self.metrics.evidence.set_books(books)

    @contextlib.contextmanager
    def _holding_back(self, policy: Policy, candidate: Candidate | None) -> Iterator[None]:
        """While policies are on their way, promise the safer of the old and the new."""
        self._is_bounded = self._is_bounded and policy.enabled
        old = self._offer
        if old and not (candidate and (old.rollout, old.policy) == (candidate.rollout, candidate.policy)):
            self._offer = None
        try:
            yield
        finally:
            self._is_bounded, self._offer = self.policy.enabled, self.candidate
            self._is_behind = True  # what the workers tell names the policies

    async def _switch(self, policy: Policy, revision: int, candidate: Candidate | None) -> None:
        try:
            await self.engine.apply(policy, revision, candidate)
        except Exception as error:
            if isinstance(error, PolicyInvalid) and not isinstance(error, PartlyRefused):
                raise  # refused by all, so that nothing changed
            self._preparation.forget()
            _log.error("revision %d is perhaps in force in some workers; putting revision %d back in all", revision, self.revision)
            try:
                await self.engine.apply(self.policy, self.revision, self.candidate)
            except Exception:  # noqa: BLE001  the first error is the one to tell
                _log.exception("revision %d could not be put back; restart the engine", self.revision)
            raise

    async def _poll(self) -> None:
        logged_steps = 0
        while True:
            await asyncio.sleep(self.settings.poll_seconds)
            self.metrics.set_connected(self.connected, time.time())
            is_active = self.take_activity()
            if not is_active and not self._is_behind:
                continue
            try:
                await self._read_counters(is_active=is_active)
            except (TimeoutError, RuntimeError) as error:
                _log.warning("reading SEDAC counters failed (%s); trying again in %.1f s", error, self.settings.poll_seconds)
                continue
            except Exception:  # noqa: BLE001  of whatever kind a worker's failure arrives as
                _log.exception("reading SEDAC counters failed; trying again in %.1f s", self.settings.poll_seconds)
                continue
            if self.settings.log_every and self.stats.num_steps - logged_steps >= self.settings.log_every:
                logged_steps = self.stats.num_steps
                rates = ", ".join(f"{c.layer}: {c.num_exited / max(1, self.stats.num_decode_tokens):.1%}" for c in self.stats.checkpoints)
                ratios = self.stats.drafting.get_rates() if self.stats.drafting else {}
                drafting = "".join(f", {name.replace('_', ' ')} {ratio:.3f}" for name, ratio in ratios.items() if ratio is not None)
                _log.info("step %d, revision %d, exit rate by checkpoint %s%s", self.stats.num_steps, self.revision, rates, drafting)

    async def _read_counters(self, *, is_active: bool) -> None:
        """Ask the workers, and show what they tell; the last steps of an engine that falls idle are asked for once it has fallen idle."""
        self._is_behind, before = False, self.stats  # before asking: a policy may come meanwhile
        try:
            self.stats = await self.engine.get_stats()
            self.metrics.add(self.stats)
            self.metrics.evidence.show()
            if self.metrics.is_speculating:
                await asyncio.to_thread(self.metrics.read_speculation)
        except BaseException:
            self._is_behind = True
            raise
        if is_active or self.stats.num_steps != before.num_steps:
            self._is_behind = True

    async def _follow(self) -> None:
        await self._identify_weights()
        await self._follower.run()

    async def _identify_weights(self) -> None:
        """Learn the weights' digest beside the running server; until then the control service does not know the engine."""
        if self.layout.weights_sha256:
            return
        try:
            digest = await asyncio.to_thread(self.find_weights)
        except Exception as error:  # noqa: BLE001  whatever keeps the digest unknown is no reason not to follow
            why = error if isinstance(error, ConfigError) else repr(error)
            _log.warning("the weights' digest is unknown, so policies that carry a certificate will be refused: %s", why)
            return
        self.layout, self.hello.weights_sha256 = replace(self.layout, weights_sha256=digest), digest
        _log.info("weights %s", digest)

    def _make_hello(self) -> control_pb2.EngineHello:
        hello = control_pb2.EngineHello()
        hello.CopyFrom(self.hello)
        hello.active_revision = self.revision
        return hello

    def _make_report(self) -> control_pb2.EngineReport:
        report = wire.stats_to_report(self.stats)
        report.evidence.extend(wire.evidence_to_proto(page) for book in self._books.values() for page in book.pages.values())
        return report
