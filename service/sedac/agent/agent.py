"""The agent: keeps the engine at the control service's policy, and serving when that service is away.

Runs on the event loop of vLLM's API server. One task follows the discovery stream and answers each push with ACK or NACK;
another reads the workers' counters. Neither is ever awaited by a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import grpc
from google.rpc import code_pb2, status_pb2

from sedac import wire
from sedac.agent.engine import AttachedEngine
from sedac.agent.metrics import EngineMetrics, get_target_exit_rates
from sedac.agent.promise import Terms
from sedac.control.v1 import control_pb2, control_pb2_grpc
from sedac.errors import ConfigError, PolicyInvalid, SedacError
from sedac.policy import EXACT, FULL, Layout, Policy, Tier, validate
from sedac.settings import EngineSettings
from sedac.stats import Stats

_log = logging.getLogger(__name__)
_MAX_BACKOFF_SECONDS = 5.0
_KEEPALIVE = [
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]


@dataclass(kw_only=True)
class Agent:
    """One engine's link to the control service, and its counters' way into /metrics."""

    engine: AttachedEngine
    settings: EngineSettings
    layout: Layout
    metrics: EngineMetrics
    hello: control_pb2.EngineHello
    find_weights: Callable[[], str]
    """returns the digest of the model's weights; may take seconds and block, and raises ConfigError where it can't be known"""
    policy: Policy = field(default_factory=Policy)
    revision: int = 0
    """in force in every worker; 0: the first policy, from the settings"""
    connected: bool = False
    refusal: str = ""
    """why the newest push was refused; empty once a push is applied"""
    stats: Stats = field(default_factory=Stats)
    _is_bounded: bool = False
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def get_terms(self) -> Terms:
        """Return what requests that arrive now are promised by: the policy in force, or nothing but exactness."""
        return Terms(policy=self.policy if self._is_bounded else replace(self.policy, enabled=False), levels=self.layout.levels)

    async def start(self, first: Policy) -> None:
        """Put the first policy into force, then follow the control service in the background.

        Raises:
            PolicyInvalid: the first policy does not fit the model.
        """
        await self._apply(first, 0)
        self._tasks = [asyncio.create_task(self._poll(), name="sedac-poll")]
        if self.settings.control_address:
            self._tasks.append(asyncio.create_task(self._follow(), name="sedac-follow"))

    async def stop(self) -> None:
        """Stop following and polling."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def describe(self) -> dict[str, Any]:
        """Return the agent's state as plain JSON types."""
        state = "STANDALONE" if not self.settings.control_address else "STALE" if not self.connected else "NACKED" if self.refusal else "SYNCED"
        return {
            "engine_id": self.settings.engine_id,
            "state": state,
            "control_address": self.settings.control_address,
            "revision": self.revision,
            "refusal": self.refusal,
            "certified": self.policy.certificate is not None,
            "policy": self.policy.to_dict(),
            "layout": asdict(self.layout),
            "tiers": [asdict(tier) for tier in (Tier(name=EXACT, level=FULL, threshold_scale=0.0), *self.policy.get_tiers())],
            "default_tier": self.policy.default_tier if self.policy.enabled else EXACT,
            "adaptation": self._describe_adaptation(),
            "stats": asdict(self.stats),
        }

    def _describe_adaptation(self) -> dict[str, Any]:
        knobs = self.policy.adaptation
        state = "off" if not (knobs.enabled and self.policy.enabled) else "frozen" if knobs.frozen else "on"
        now = {c.layer: c for c in self.stats.checkpoints}
        targets = get_target_exit_rates(self.policy)
        checkpoints = [
            {
                "layer": c.layer,
                "policy_threshold": c.threshold,
                "threshold": now[c.layer].threshold if state != "off" and c.layer in now else c.threshold,
                "exit_rate": now[c.layer].exit_rate if c.layer in now else 0.0,
                "target_exit_rate": targets.get(c.layer),
            }
            for c in self.policy.checkpoints
        ]
        return {"state": state, "generation": knobs.generation, "num_adaptations": self.stats.num_adaptations, "checkpoints": checkpoints}

    async def _apply(self, policy: Policy, revision: int) -> None:
        if policy.certificate:
            validate(policy, self.layout)  # the workers check all but the certificate, for they don't know the weights
        self._is_bounded = self._is_bounded and policy.enabled  # while a policy is on its way, the safer promise of the two
        try:
            await self.engine.apply(policy, revision)
            self.policy, self.revision = policy, revision
        finally:
            self._is_bounded = self.policy.enabled
        self.metrics.set_policy(policy, revision, self.layout)

    async def _poll(self) -> None:
        logged_steps = 0
        while True:
            await asyncio.sleep(self.settings.poll_seconds)
            try:
                self.stats = await self.engine.get_stats()
            except (TimeoutError, RuntimeError) as error:
                _log.warning("reading SEDAC counters failed (%s); trying again in %.1f s", error, self.settings.poll_seconds)
                continue
            self.metrics.add(self.stats)
            if self.metrics.is_speculating:
                await asyncio.to_thread(self.metrics.read_speculation)
            self.metrics.set_connected(self.connected, time.time())
            if self.settings.log_every and self.stats.num_steps - logged_steps >= self.settings.log_every:
                logged_steps = self.stats.num_steps
                rates = ", ".join(f"{c.layer}: {c.num_exited / max(1, self.stats.num_decode_tokens):.1%}" for c in self.stats.checkpoints)
                _log.info("step %d, revision %d, exit rate by checkpoint %s", self.stats.num_steps, self.revision, rates)

    async def _identify_weights(self) -> None:
        """Learn the weights' digest beside the running server; until then the control service does not know the engine."""
        try:
            digest = await asyncio.to_thread(self.find_weights)
        except ConfigError as error:
            _log.warning("the weights' digest is unknown, so policies that carry a certificate will be refused: %s", error)
            return
        self.layout, self.hello.weights_sha256 = replace(self.layout, weights_sha256=digest), digest
        _log.info("weights %s", digest)

    async def _follow(self) -> None:
        await self._identify_weights()
        backoff = 0.2
        async with grpc.aio.insecure_channel(self.settings.control_address, options=_KEEPALIVE) as channel:
            stub = control_pb2_grpc.DiscoveryStub(channel)
            while True:
                try:
                    await self._follow_once(stub)
                    reason = "the service closed the stream"
                except grpc.aio.AioRpcError as error:
                    reason = f"{error.code().name}: {error.details()}"
                if self.connected:
                    _log.warning(
                        "control service at %s lost (%s); serving on under revision %d", self.settings.control_address, reason, self.revision
                    )
                    backoff = 0.2
                self.connected = False
                await asyncio.sleep(backoff * random.uniform(0.5, 1.5))
                backoff = min(backoff * 2, _MAX_BACKOFF_SECONDS)

    async def _follow_once(self, stub: control_pb2_grpc.DiscoveryStub) -> None:
        outbox: asyncio.Queue[control_pb2.EngineMessage] = asyncio.Queue()
        hello = control_pb2.EngineHello()
        hello.CopyFrom(self.hello)
        hello.active_revision = self.revision
        outbox.put_nowait(control_pb2.EngineMessage(hello=hello))
        reporter = asyncio.create_task(self._report(outbox), name="sedac-report")
        try:
            async for push in stub.Follow(_drain(outbox)):
                if not self.connected:
                    self.connected = True
                    self.metrics.set_connected(True, time.time())
                    _log.info("following control service at %s", self.settings.control_address)
                outbox.put_nowait(control_pb2.EngineMessage(answer=await self._answer(push)))
        finally:
            reporter.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reporter

    async def _report(self, outbox: asyncio.Queue[control_pb2.EngineMessage]) -> None:
        while True:
            await asyncio.sleep(max(self.settings.poll_seconds, 0.5))
            outbox.put_nowait(control_pb2.EngineMessage(report=wire.stats_to_report(self.stats)))

    async def _answer(self, push: control_pb2.PolicyPush) -> control_pb2.PolicyAnswer:
        started, revision = time.monotonic(), push.policy.revision
        error: status_pb2.Status | None = None
        try:
            await self._apply(wire.policy_from_proto(push.policy), revision)
            self.refusal = ""
            _log.info("policy revision %d in force", revision)
        except PolicyInvalid as refused:
            self.refusal, error = str(refused), wire.error_to_status(refused, code_pb2.INVALID_ARGUMENT)
        except (SedacError, TimeoutError, RuntimeError) as failed:
            self.refusal, error = str(failed), wire.error_to_status(failed, code_pb2.INTERNAL)
        seconds = time.monotonic() - started
        if error is not None:
            _log.error("policy revision %d refused, revision %d stays in force: %s", revision, self.revision, self.refusal)
        self.metrics.count_update(accepted=error is None, seconds=seconds)
        return control_pb2.PolicyAnswer(nonce=push.nonce, revision=self.revision, error=error, apply_seconds=seconds)


async def _drain(outbox: asyncio.Queue[control_pb2.EngineMessage]) -> AsyncIterator[control_pb2.EngineMessage]:
    while True:
        yield await outbox.get()
