"""A fleet of real agents and simulated engines on one real control service, with engines that crash and join between changes."""

from __future__ import annotations

import asyncio
import random

import pytest
from sedac.client.client import ControlClient
from sedac.contract.v1 import control_pb2
from sedac.control.base.metrics import ControlMetrics
from sedac.control.fleet import fleet as fleet_module
from sedac.control.fleet.fleet import Fleet as RememberedFleet

from testing.control.processes import ControlProcess
from testing.control.simulated import Fleet


def test_every_change_reaches_every_engine_whoever_comes_and_goes(tmp_path):
    random_numbers = random.Random(7)

    async def scenario() -> None:
        fleet = Fleet(service.address, num_simulated=32, num_agents=8)
        await fleet.start()
        for _ in range(20):
            gone = fleet.choose(4, random_numbers)
            await fleet.crash(gone)
            changing = asyncio.create_task(fleet.change())
            fleet.restart(gone[:2])  # in the middle of the change
            revision = await changing
            await fleet.wait_until_acked(revision)
            assert {engine.revision for engine in fleet.live} == {revision}
            assert {agent.revision for agent in fleet.agents} == {revision}
            fleet.restart(gone[2:])  # between changes: what they get first is the policy in force
            await fleet.wait_until_acked(revision)
            assert all(engine.applied[-2:] == [0, revision] for engine in gone[2:])
        for agent in fleet.agents:
            applied = agent.engine.client.applied
            assert applied == sorted(set(applied)), "each once, in order"
        for engine in fleet.engines:
            lives = " ".join(map(str, engine.applied)).split(" 0")
            assert all(life.split() == sorted(set(life.split()), key=int) for life in lives), "in each life each once, in order"
        await fleet.stop()

    with ControlProcess(tmp_path / "control.sqlite3") as service:
        asyncio.run(scenario())
        with ControlClient(service.address) as client:
            assert client.get_policy().revision == 21
            assert len(client.get_status().engines) == 40


def test_only_so_many_engines_that_are_gone_are_remembered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fleet_module, "_MAX_GONE", 3)
    fleet = RememberedFleet(ControlMetrics())
    stayed, _ = fleet.join(control_pb2.EngineHello(engine_id="stayed"), "peer")
    for number in range(10):
        engine, _ = fleet.join(control_pb2.EngineHello(engine_id=f"e{number}"), "peer")
        fleet.leave(engine)
    fleet.forget()
    assert list(fleet.engines) == ["stayed", "e7", "e8", "e9"]
    assert fleet.engines["stayed"] is stayed
