"""A control service that is away, slow, frozen or answers garbage, and a real agent: the last good policy stays, and all mends by itself."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import socket

import grpc
import pytest
from sedac.agent import following
from sedac.agent.status import describe_agent
from sedac.client.client import ControlClient
from sedac.contract import wire
from sedac.contract.v1 import control_pb2, control_pb2_grpc
from sedac.policy.model import Checkpoint, Policy, Tier

from testing.control.agents import make_agent, wait_until
from testing.control.engines import FIRST
from testing.control.processes import ControlProcess
from testing.control.proxies import Proxy, babbling, impersonating
from testing.control.running import RunningServer

_SPEED = 20
"""how much faster than in service the clocks of keepalive run here; gRPC pings at most once a second"""
_GIVE_UP = ("grpc.http2.ping_timeout_ms", 1000)
"""how long a ping may take where the test wants it to fail"""
_CLOCKS = ("grpc.keepalive_time_ms", "grpc.http2.min_ping_interval_without_data_ms", "grpc.max_connection_idle_ms")


def _accelerate(options, *instead):
    kept = [(name, value // _SPEED if name in _CLOCKS else value) for name, value in options if name not in dict(instead)]
    return kept + list(instead)


@pytest.fixture
def make_fast_server(settings, monkeypatch):
    """Makes a service whose clocks of keepalive run fast."""
    make, running = grpc.aio.server, []

    def make_fast(*instead):
        monkeypatch.setattr(grpc.aio, "server", lambda *args, options, **more: make(*args, options=_accelerate(options, *instead), **more))
        running.append(RunningServer(settings))
        return running[0]

    yield make_fast
    for server in running:
        server.stop()


@contextlib.asynccontextmanager
async def _following(address: str, name: str):
    agent = await make_agent(address, name)
    await agent.start(FIRST)
    try:
        yield agent
    finally:
        await agent.stop()


def _get_state(agent) -> str:
    return describe_agent(agent)["state"]


async def _change(address: str, policy: Policy) -> int:
    def change() -> int:
        with ControlClient(address) as client:
            return client.update_policy(policy).revision

    return await asyncio.to_thread(change)


async def _look(address: str) -> dict[str, control_pb2.EngineStatus]:
    def look() -> dict[str, control_pb2.EngineStatus]:
        with ControlClient(address) as client:
            return {e.engine.engine_id: e for e in client.get_status().engines}

    return await asyncio.to_thread(look)


async def _wait_for_state(address: str, name: str, state: control_pb2.EngineState) -> None:
    async with asyncio.timeout(30):
        while (await _look(address))[name].state != state:  # noqa: ASYNC110  it is another process's
            await asyncio.sleep(0.02)


def test_a_killed_service_leaves_the_policy_and_is_followed_again(tmp_path):
    async def scenario() -> None:
        async with _following(service.address, "killed") as agent:
            await wait_until(lambda: agent.revision == 1)
            for revision in (2, 3, 4):
                await asyncio.to_thread(service.kill)
                await wait_until(lambda: _get_state(agent) == "STALE")
                assert (agent.revision, agent.policy.checkpoints) == (revision - 1, FIRST.checkpoints), "the last good policy stays"
                assert agent.get_terms().policy.enabled, "and what it promises"
                await asyncio.to_thread(service.start)
                assert await _change(service.address, FIRST) == revision
                await wait_until(lambda revision=revision: (agent.revision, _get_state(agent)) == (revision, "SYNCED"))
            await _wait_for_state(service.address, "killed", control_pb2.ENGINE_STATE_SYNCED)
            assert agent.engine.client.applied[-1] == 4

    with ControlProcess(tmp_path / "control.sqlite3", SEDAC_CONTROL_PORT=str(_find_port())) as service:
        asyncio.run(scenario())


def test_a_frozen_service_is_told_from_a_quiet_one(tmp_path, monkeypatch):
    """Its connections stay open and nothing comes: only the pings show it."""
    monkeypatch.setattr(following, "_OPTIONS", _accelerate(following._OPTIONS, _GIVE_UP))

    async def scenario() -> None:
        async with _following(service.address, "frozen") as agent:
            await wait_until(lambda: _get_state(agent) == "SYNCED" and agent.revision == 1)
            service.freeze()
            try:
                await wait_until(lambda: _get_state(agent) == "STALE")
                assert agent.revision == 1
            finally:
                service.thaw()
            revision = await _change(service.address, Policy(enabled=False))
            await wait_until(lambda: (agent.revision, _get_state(agent)) == (revision, "SYNCED"))

    with ControlProcess(tmp_path / "control.sqlite3") as service:
        asyncio.run(scenario())


def test_a_slow_line_delays_changes_and_nothing_else(server):
    async def scenario() -> None:
        proxy = Proxy(server.address)
        async with _following(await proxy.start(), "slow") as agent:
            await wait_until(lambda: agent.revision == 1)
            proxy.delay_seconds = 0.4
            for _ in range(3):
                revision = await _change(server.address, FIRST)
                assert agent.revision < revision, "not yet"
                await wait_until(lambda revision=revision: agent.revision == revision)
                assert _get_state(agent) == "SYNCED"
            await _wait_for_state(server.address, "slow", control_pb2.ENGINE_STATE_SYNCED)
            applied = agent.engine.client.applied
            assert applied == sorted(set(applied)), "each once, in order"
        await proxy.stop()

    asyncio.run(scenario())


def test_a_line_that_swallows_everything_makes_the_engine_stale_on_both_sides(make_fast_server, monkeypatch):
    monkeypatch.setattr(following, "_OPTIONS", _accelerate(following._OPTIONS, _GIVE_UP))
    running = make_fast_server(_GIVE_UP)

    async def scenario() -> None:
        proxy = Proxy(running.address)
        async with _following(await proxy.start(), "cut") as agent:
            await wait_until(lambda: agent.revision == 1)
            proxy.is_hole = True
            await _wait_for_state(running.address, "cut", control_pb2.ENGINE_STATE_STALE)
            await wait_until(lambda: _get_state(agent) == "STALE")
            revision = await _change(running.address, FIRST)
            assert agent.revision == 1
            proxy.is_hole = False
            await wait_until(lambda: (agent.revision, _get_state(agent)) == (revision, "SYNCED"))
            await _wait_for_state(running.address, "cut", control_pb2.ENGINE_STATE_SYNCED)
        await proxy.stop()

    asyncio.run(scenario())


def _push(policy: control_pb2.Policy | None = None, **changes) -> bytes:
    policy = policy or wire.policy_to_proto(FIRST, revision=99)
    for name, value in changes.items():
        setattr(policy, name, value)
    return control_pb2.PolicyPush(nonce="n", policy=policy).SerializeToString()


def _with(**knobs) -> bytes:
    policy = wire.policy_to_proto(FIRST, revision=99)
    for name, value in knobs.items():
        setattr(policy.checkpoints[0], name, value)
    return _push(policy)


_RANDOM = random.Random(5)
_MANY = Policy(checkpoints=tuple(Checkpoint(layer=i, threshold=1) for i in range(5000)))
_GARBAGE = {
    "random bytes": [_RANDOM.randbytes(200), _RANDOM.randbytes(1)],
    "another message": [control_pb2.Status(engines=[control_pb2.EngineStatus()] * 3).SerializeToString()],
    "nothing in it": [b""],
    "revision 0": [_push(revision=0)],
    "a negative revision": [_push(revision=-7)],
    "thresholds that are no numbers": [_with(threshold=math.nan), _with(threshold=math.inf), _with(threshold=-math.inf), _with(weight=math.nan)],
    "a layer that is not there": [_with(layer=2**31 - 1), _with(layer=-1)],
    "unknown enums": [_push(rule=77), _push(phase=-1), _push(scope=9)],
    "a probe set that nobody has": [_push(probe_set="../../etc/passwd"), _push(probe_set="\0" * 300)],
    "too many checkpoints": [_push(wire.policy_to_proto(_MANY, revision=99))],
    "a tier of no name": [_push(wire.policy_to_proto(Policy(enabled=True, tiers=(Tier(name=""),)), revision=99))],
    "8 MiB": [_push(comment="x" * 2**23)],
    "an end at once": [],
}


def test_garbage_on_the_stream_changes_nothing_and_is_outlived(settings, monkeypatch):
    monkeypatch.setattr(following, "_MAX_BACKOFF_SECONDS", 0.1)

    async def scenario() -> None:
        running = await asyncio.to_thread(RunningServer, settings)
        fixed = settings.model_copy(update={"port": running.server.port})
        async with _following(running.address, "steadfast") as agent:
            await wait_until(lambda: agent.revision == 1)
            terms = agent.get_terms()
            await asyncio.to_thread(running.stop)
            await wait_until(lambda: _get_state(agent) == "STALE")

            async def stay(heard: list[int], what: str) -> None:
                await wait_until(lambda: len(heard) > 1)  # the second try tells that the first is over
                assert (agent.revision, agent.policy, agent.get_terms()) == (1, FIRST, terms), what
                assert agent.engine.client.revisions == [1, 1], what
                assert _get_state(agent) in ("STALE", "NACKED"), what

            with babbling(fixed.port) as connections:
                await stay(connections, "bytes that are no HTTP/2")
            for what, messages in _GARBAGE.items():
                with impersonating(fixed.port, messages) as calls:
                    await stay(calls, what)
            for code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.PERMISSION_DENIED):
                with impersonating(fixed.port, [], code) as calls:
                    await stay(calls, code.name)
            assert set(agent.engine.client.applied) <= {0, 1}, "no garbage ever reached a worker and stayed"

            again = await asyncio.to_thread(RunningServer, fixed)
            revision = await _change(again.address, Policy(enabled=False))
            await wait_until(lambda: (agent.revision, _get_state(agent)) == (revision, "SYNCED"))
            await _wait_for_state(again.address, "steadfast", control_pb2.ENGINE_STATE_SYNCED)
        await asyncio.to_thread(again.stop)

    asyncio.run(scenario())


@pytest.mark.parametrize("minutes", [2, pytest.param(10, marks=pytest.mark.thorough)])
def test_minutes_of_nothing_but_pings_break_no_stream(make_fast_server, monkeypatch, minutes):
    options = _accelerate(following._OPTIONS, ("grpc.http2.max_pings_without_data", 0))
    monkeypatch.setattr(following, "_OPTIONS", options)
    server = make_fast_server()

    async def scenario() -> None:
        connects: list[bool] = []
        agent = await make_agent(server.address, "idle")
        agent._follower.report_seconds = 3600.0  # so that pings are all there is
        agent._follower.on_connected = connects.append
        await agent.start(FIRST)
        await wait_until(lambda: agent.revision == 1)
        async with grpc.aio.insecure_channel(server.address, options=options) as channel:
            watch = control_pb2_grpc.ControlStub(channel).WatchPolicy(control_pb2.WatchPolicyRequest(from_revision=1))
            assert (await watch.read()).revision == 1
            await asyncio.sleep(minutes * 60 / _SPEED)
            revision = await _change(server.address, FIRST)
            assert (await watch.read()).revision == revision, "the same stream goes on"
            await wait_until(lambda: agent.revision == revision)
            assert connects == [True], "the agent never had to connect again"
            watch.cancel()
        await agent.stop()

    asyncio.run(scenario())


def test_a_caller_that_pings_more_often_is_cut_off(server):
    """So that the test above can fail: a ping each second is more than the service bears at its own speed."""
    options = _accelerate(following._OPTIONS, ("grpc.http2.max_pings_without_data", 0))

    async def scenario() -> None:
        async with grpc.aio.insecure_channel(server.address, options=options) as channel:
            watch = control_pb2_grpc.ControlStub(channel).WatchPolicy(control_pb2.WatchPolicyRequest(), timeout=60)
            with pytest.raises(grpc.aio.AioRpcError, match="Too many pings") as ended:
                await watch.read()
        assert ended.value.code() == grpc.StatusCode.UNAVAILABLE

    asyncio.run(scenario())


def _find_port() -> int:
    """A port that is free now and can be had again after a kill."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
