"""Fleets in one process: simulated engines that speak the real protocol over connections of their own, beside real agents."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Collection

import grpc
from sedac.client.client import ControlClient
from sedac.contract import wire
from sedac.contract.v1 import control_pb2, control_pb2_grpc

from testing.control.agents import make_agent
from testing.control.engines import FIRST
from testing.workers import LAYOUT

_OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]


class SimulatedEngine:
    """An engine that acknowledges every push at once, reports now and then, and may be crashed and started again."""

    def __init__(self, address: str, name: str, *, report_seconds: float = 2.0) -> None:
        self.name, self._address, self._report_seconds = name, address, report_seconds
        self.applied: list[int] = []
        """Revisions in the order in which they were applied, over all connections."""
        self.times: dict[int, float] = {}
        """Time of the monotonic clock at which each revision was applied, by revision."""
        self._task: asyncio.Task[None] | None = None

    @property
    def revision(self) -> int:
        """In force now; it outlives a crash of the connection, not of the engine."""
        return self.applied[-1] if self.applied else 0

    def start(self) -> None:
        """Connect and follow."""
        self._task = asyncio.create_task(self._follow())

    async def crash(self) -> None:
        """Be gone without a word."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
                await self._task
            self._task = None
        self.applied.append(0)

    async def _follow(self) -> None:
        outbox: asyncio.Queue[control_pb2.EngineMessage] = asyncio.Queue()
        hello = control_pb2.EngineHello(engine_id=self.name, initial_policy=wire.policy_to_proto(FIRST), **vars(LAYOUT))
        outbox.put_nowait(control_pb2.EngineMessage(hello=hello))
        async with grpc.aio.insecure_channel(self._address, options=_OWN_CONNECTION) as channel:
            async for push in control_pb2_grpc.DiscoveryStub(channel).Follow(self._drain(outbox)):
                self.applied.append(push.policy.revision)
                self.times[push.policy.revision] = time.monotonic()
                outbox.put_nowait(control_pb2.EngineMessage(answer=control_pb2.PolicyAnswer(nonce=push.nonce, revision=push.policy.revision)))

    async def _drain(self, outbox: asyncio.Queue[control_pb2.EngineMessage]) -> AsyncIterator[control_pb2.EngineMessage]:
        while True:
            try:
                yield await asyncio.wait_for(outbox.get(), self._report_seconds)
            except TimeoutError:
                yield control_pb2.EngineMessage(report=control_pb2.EngineReport(active_revision=self.revision))


class Fleet:
    """Simulated engines and real agents on one control service, and an operator who watches them."""

    def __init__(self, address: str, *, num_simulated: int, num_agents: int) -> None:
        self._address, self._num_agents = address, num_agents
        self.engines = [SimulatedEngine(address, f"simulated-{i:03}") for i in range(num_simulated)]
        self.live = set(self.engines)
        self.agents = []
        self._shown: dict[str, control_pb2.EngineStatus] = {}
        self._changed = asyncio.Event()

    async def start(self) -> None:
        """Connect everybody; returns when the operator sees all of them SYNCED."""
        self.agents = [await make_agent(self._address, f"agent-{i}") for i in range(self._num_agents)]
        self._channel = grpc.aio.insecure_channel(self._address)
        self._watch = asyncio.create_task(self._follow())
        for engine in self.engines:
            engine.start()
        for agent in self.agents:
            await agent.start(FIRST)
        await self.wait_until_acked(1)

    async def stop(self) -> None:
        """Disconnect everybody."""
        self._watch.cancel()
        await asyncio.gather(self._watch, *(agent.stop() for agent in self.agents), *(e.crash() for e in self.live), return_exceptions=True)
        await self._channel.close()

    async def _follow(self) -> None:
        async for message in control_pb2_grpc.ControlStub(self._channel).WatchEngines(control_pb2.WatchEnginesRequest()):
            for engine in message.engines:
                self._shown[engine.engine.engine_id] = engine
            self._changed.set()

    async def change(self) -> int:
        """Make a new revision."""

        def change() -> int:
            with ControlClient(self._address) as client:
                return client.update_policy(FIRST).revision

        return await asyncio.to_thread(change)

    async def wait_until_acked(self, revision: int, seconds: float = 60.0) -> None:
        """Return once the operator sees every live engine SYNCED with this revision or a newer one."""
        names = {engine.name for engine in self.live} | {agent.settings.engine_id for agent in self.agents}
        async with asyncio.timeout(seconds):
            while late := [name for name in names if not self._is_synced(name, revision)]:  # noqa: F841  read in a debugger
                self._changed.clear()
                await self._changed.wait()

    def _is_synced(self, name: str, revision: int) -> bool:
        shown = self._shown.get(name)
        return shown is not None and shown.state == control_pb2.ENGINE_STATE_SYNCED and shown.desired_revision >= revision

    def find_last_apply(self, revision: int) -> float:
        """The monotonic clock when the last of the live simulated engines that were there had applied a revision."""
        return max(engine.times[revision] for engine in self.live if revision in engine.times)

    async def crash(self, engines: Collection[SimulatedEngine]) -> None:
        """Let some be gone without a word."""
        self.live -= set(engines)
        await asyncio.gather(*(engine.crash() for engine in engines))

    def restart(self, engines: Collection[SimulatedEngine]) -> None:
        """Let some come back, with nothing applied."""
        for engine in engines:
            engine.start()
        self.live |= set(engines)

    def choose(self, count: int, random_numbers: random.Random) -> list[SimulatedEngine]:
        """Some of the live ones."""
        return random_numbers.sample(sorted(self.live, key=lambda engine: engine.name), count)
