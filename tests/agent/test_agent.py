"""The agent between a real control service and two workers: pushes, refusals, a service that goes away, what it shows."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import replace

import pytest
from sedac.agent.agent import Agent
from sedac.agent.engine import AttachedEngine
from sedac.agent.metrics import EngineMetrics
from sedac.agent.status import describe_agent
from sedac.client.client import ControlClient
from sedac.contract import wire
from sedac.contract.stats import CheckpointStats, Stats, TierStats
from sedac.contract.v1 import control_pb2, evidence_pb2
from sedac.errors import ConfigError, PolicyInvalid
from sedac.policy.model import Adaptation, Checkpoint, Policy, Tier
from sedac.settings import EngineSettings

from testing.control.engines import FIRST
from testing.control.fixtures import settings  # noqa: F401  fixture
from testing.control.running import RunningServer
from testing.figures import get_metric, make_controller, make_drafting
from testing.strategies import certify
from testing.workers import LAYOUT, Workers


def _refuse_weights() -> str:
    raise ConfigError("random weights")


async def _make_agent(address: str, name: str, hello_layers=(2, 5, 8), find_weights=_refuse_weights) -> Agent:
    engine = AttachedEngine(client=Workers())
    layout = await engine.describe()
    assert layout == LAYOUT
    layout = replace(layout, probe_set_sha256="2" * 64)
    hello = control_pb2.EngineHello(engine_id=name, **{**vars(layout), "checkpoint_layers": hello_layers})
    return Agent(
        engine=engine,
        settings=EngineSettings(control_address=address, engine_id=name, poll_seconds=0.05),
        layout=layout,
        metrics=EngineMetrics(model_name=name, layout=layout),
        hello=hello,
        find_weights=find_weights,
    )


async def _until(condition, seconds=10.0):
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  the agent has nothing to wait for
            await asyncio.sleep(0.01)


def test_follows_refuses_and_outlives_the_service(settings):  # noqa: F811
    async def scenario() -> None:
        server = await asyncio.to_thread(RunningServer, settings)
        fixed = settings.model_copy(update={"port": server.server.port})
        # The service believes that layer 9 is attached, so that the engine's own check is what refuses.
        agent = await _make_agent(server.address, "follower", hello_layers=(2, 5, 8, 9))
        await agent.start(FIRST)
        assert agent.get_terms().policy == FIRST
        with ControlClient(server.address) as client:
            made = await asyncio.to_thread(client.update_policy, Policy(enabled=False))
            await _until(lambda: agent.revision == made.revision)
            assert not agent.get_terms().policy.enabled
            assert set(agent.engine.client.revisions) == {made.revision}
            bad = Policy(enabled=True, checkpoints=(Checkpoint(layer=9, threshold=1),))
            await asyncio.to_thread(client.update_policy, bad)
            await _until(lambda: agent.refusal != "")
            assert "checkpoints[0].layer: 9 has no probe attached" in agent.refusal
            assert (agent.revision, describe_agent(agent)["state"], agent.get_terms().policy.enabled) == (made.revision, "NACKED", False)
            full = replace(FIRST, tiers=(Tier(name="mine", floor="width-25"),), default_tier="mine", sensitivity=0.5)
            good = await asyncio.to_thread(client.update_policy, full)
            await _until(lambda: agent.revision == good.revision)
            assert describe_agent(agent)["state"] == "SYNCED"
            assert agent.engine.client.policies == [full, full], "every knob arrives in every worker"
            assert list(client.get_status().engines[0].engine.levels) == list(LAYOUT.levels)
        assert get_metric("sedac_policy_updates_total", "follower", result="nack") == 1
        assert get_metric("sedac_threshold", "follower", checkpoint="5") == 0.25
        await asyncio.to_thread(server.stop)
        await _until(lambda: describe_agent(agent)["state"] == "STALE")
        await _until(lambda: get_metric("sedac_control_connected", "follower") == 0)
        assert agent.revision == good.revision, "the last good policy stays"
        again = await asyncio.to_thread(RunningServer, fixed)
        await _until(lambda: describe_agent(agent)["state"] == "SYNCED")
        await agent.stop()
        await asyncio.to_thread(again.stop)

    asyncio.run(scenario())


def test_what_the_workers_count_reaches_the_service(settings):  # noqa: F811
    async def scenario() -> None:
        server = await asyncio.to_thread(RunningServer, settings)
        agent = await _make_agent(server.address, "counter")
        stats = Stats(
            num_steps=5,
            num_mlp_blocks_computed=7.25,
            num_adaptations=3,
            checkpoints=(CheckpointStats(layer=2, num_evaluated=9, num_exited=4, threshold=0.375, exit_rate=0.5),),
            tiers=(TierStats(name="balanced", num_tokens=11, num_exited=4, num_mlp_blocks_computed=100.5),),
            drafting=make_drafting((3, 1), (0, 0), controller=(make_controller(1),)),
        )
        agent.engine.client.stats = stats
        await agent.start(FIRST)
        with ControlClient(server.address) as client:
            engines: list[control_pb2.EngineStatus] = []

            def arrived() -> bool:
                engines[:] = client.get_status().engines
                return bool(engines) and engines[0].report.num_steps == 5

            await _until(arrived)
        report = control_pb2.EngineReport()
        report.CopyFrom(engines[0].report)
        assert {(e.side, e.tier) for e in report.evidence} == {(evidence_pb2.SIDE_STABLE, "exact"), (evidence_pb2.SIDE_STABLE, "balanced")}
        del report.evidence[:]
        assert report == wire.stats_to_report(replace(stats, active_revision=report.active_revision))
        assert wire.drafting_from_proto(report.drafting) == stats.drafting
        assert get_metric("sedac_draft_accepted_tokens_total", "counter", kind="adapter") == 1
        assert json.loads(json.dumps(describe_agent(agent), allow_nan=False))["drafting"]["tokens_per_step"] == 1.5
        await agent.stop()
        await asyncio.to_thread(server.stop)

    asyncio.run(scenario())


def test_workers_that_compute_nothing_are_left_alone():
    async def scenario() -> None:
        agent = await _make_agent("", "idle")
        workers, is_active = agent.engine.client, False
        agent.take_activity = lambda: is_active

        async def rest() -> int:
            """Return how often the workers were asked once nothing more happens."""
            num = -1
            while num != workers.num_calls["sedac_get_stats"]:
                num = workers.num_calls["sedac_get_stats"]
                await asyncio.sleep(0.3)
            return num

        await agent.start(FIRST)
        assert await rest() == 1, "once for the first policy"
        await agent._apply(replace(FIRST, decay=0.5), 4)
        await _until(lambda: agent.stats.active_revision == 4)
        assert await rest() == 2, "once for each policy"
        is_active = True
        await asyncio.sleep(0.3)
        is_active, workers.stats = False, Stats(num_steps=7)
        await _until(lambda: agent.stats.num_steps == 7)
        assert get_metric("sedac_steps_total", "idle") == 7
        asked = await rest()
        workers.stats = Stats(num_steps=9)
        assert await rest() == asked, "nobody said that there was anything to compute"
        workers.failing["sedac_get_stats"] = TimeoutError("busy")
        is_active = True
        await asyncio.sleep(0.15)
        is_active = False
        await asyncio.sleep(0.15)
        del workers.failing["sedac_get_stats"]
        await _until(lambda: agent.stats.num_steps == 9)
        await agent.stop()

    asyncio.run(scenario())


def test_a_first_policy_that_does_not_fit_stops_the_start():
    async def scenario() -> None:
        agent = await _make_agent("", "misfit")
        with pytest.raises(PolicyInvalid, match="3 has no probe attached"):
            await agent.start(Policy(enabled=True, checkpoints=(Checkpoint(layer=3, threshold=1),)))
        assert not agent.get_terms().policy.enabled

    asyncio.run(scenario())


def test_while_a_policy_is_on_its_way_the_safer_promise_holds():
    async def scenario() -> None:
        agent = await _make_agent("", "between")
        workers = agent.engine.client
        await agent.start(FIRST)
        for new, meanwhile, after in ((replace(FIRST, enabled=False), False, False), (FIRST, False, True), (replace(FIRST, decay=0.5), True, True)):
            workers.gate.clear()
            applying = asyncio.create_task(agent._apply(new, 0))
            await asyncio.sleep(0.01)
            assert agent.get_terms().policy.enabled == meanwhile
            workers.gate.set()
            await applying
            assert agent.get_terms().policy == new
            assert agent.get_terms().policy.enabled == after
        await agent.stop()

    asyncio.run(scenario())


def test_status_shows_tiers_levels_and_adaptation():
    async def scenario() -> None:
        agent = await _make_agent("", "shown")
        adaptation = Adaptation(enabled=True, target_exit_rates=(0.2, 0.4), generation=2)
        agent.engine.client.stats = Stats(
            num_adaptations=7, checkpoints=(CheckpointStats(layer=2, num_evaluated=9, num_exited=4, threshold=0.375, exit_rate=0.25),)
        )
        await agent.start(replace(FIRST, adaptation=adaptation, tiers=(Tier(name="mine"),), default_tier="mine"))
        await _until(lambda: agent.stats.num_adaptations == 7)
        shown = json.loads(json.dumps(describe_agent(agent)))
        await agent.stop()
        assert [tier["name"] for tier in shown["tiers"]] == ["exact", "mine"]
        assert shown["default_tier"] == "mine"
        assert shown["layout"]["levels"] == ["full", "skip", "width-25"]
        assert shown["stats"]["checkpoints"][0]["threshold"] == 0.375
        told = shown["adaptation"]
        assert (told["state"], told["generation"], told["num_adaptations"]) == ("on", 2, 7)
        assert told["checkpoints"] == [
            {"layer": 2, "policy_threshold": 0.5, "threshold": 0.375, "exit_rate": 0.25, "target_exit_rate": 0.2},
            {"layer": 5, "policy_threshold": 0.25, "threshold": 0.25, "exit_rate": 0.0, "target_exit_rate": 0.4},
        ]

    asyncio.run(scenario())


def test_the_first_policy_may_be_certified_for_these_weights_alone(settings):  # noqa: F811
    async def scenario() -> None:
        server = await asyncio.to_thread(RunningServer, settings)
        agent = await _make_agent(server.address, "first", find_weights=lambda: "1" * 64)
        await agent.start(certify(FIRST))
        assert (describe_agent(agent)["certified"], agent.engine.client.policies) == (True, [certify(FIRST)] * 2)
        await agent.stop()
        other = await _make_agent(server.address, "other", find_weights=lambda: "b" * 64)
        with pytest.raises(PolicyInvalid, match=r"certificate.weights_sha256: 111111111111\.\.\., the engine has bbbbbbbbbbbb"):
            await other.start(certify(FIRST))
        unknown = await _make_agent(server.address, "unknown")
        with pytest.raises(PolicyInvalid, match=r"certificate.weights_sha256: .* the engine does not know its own"):
            await unknown.start(certify(FIRST))
        await asyncio.to_thread(server.stop)

    asyncio.run(scenario())


def test_a_fitting_certificate_is_taken_and_a_foreign_one_refused(settings):  # noqa: F811
    async def scenario() -> None:
        server = await asyncio.to_thread(RunningServer, settings)
        agent = await _make_agent(server.address, "certified", find_weights=lambda: "1" * 64)
        await agent.start(FIRST)
        with ControlClient(server.address) as client:
            await _until(lambda: len(client.get_status().engines) == 1)
            for stated in ({"weights": "a" * 64}, {"probe_set": "a" * 64}):
                with pytest.raises(PolicyInvalid, match=r"_sha256: aaaaaaaaaaaa\.\.\., the engine has .*certify again.*\(engine certified\)"):
                    await asyncio.to_thread(client.update_policy, certify(FIRST, **stated))
            made = await asyncio.to_thread(client.update_policy, certify(FIRST))
            await _until(lambda: agent.revision == made.revision)
            assert describe_agent(agent)["certified"]
            assert describe_agent(agent)["policy"]["certificate"]["tier"] == "balanced"
            assert get_metric("sedac_policy_certified", "certified") == 1
            assert agent.engine.client.policies == [certify(FIRST)] * 2
            other = await _make_agent(server.address, "other", find_weights=lambda: "b" * 64)
            unknown = await _make_agent(server.address, "unknown")
            for late in (other, unknown):
                await late.start(FIRST)
                await _until(lambda late=late: late.refusal != "")
                assert (late.revision, describe_agent(late)["certified"]) == (0, False)
                assert get_metric("sedac_policy_certified", late.settings.engine_id) == 0
            assert "certificate.weights_sha256: 111111111111..., the engine has bbbbbbbbbbbb...; certify again on this model" in other.refusal
            assert "certificate.weights_sha256: 111111111111... can't be checked: the engine does not know its own" in unknown.refusal
            status = await asyncio.to_thread(client.get_status)
            assert [e.state for e in status.engines] == [control_pb2.ENGINE_STATE_SYNCED, *[control_pb2.ENGINE_STATE_NACKED] * 2]
            assert "certificate.weights_sha256" in status.engines[1].error.message
            made = await asyncio.to_thread(client.update_policy, FIRST)
            await _until(lambda: {a.revision for a in (agent, other, unknown)} == {made.revision})
            assert get_metric("sedac_policy_certified", "certified") == 0
        for each in (agent, other, unknown):
            await each.stop()
        await asyncio.to_thread(server.stop)

    asyncio.run(scenario())


def test_requests_are_served_while_the_weights_are_still_read(settings):  # noqa: F811
    async def scenario() -> None:
        server = await asyncio.to_thread(RunningServer, settings)
        done = threading.Event()
        agent = await _make_agent(server.address, "slow", find_weights=lambda: "1" * 64 if done.wait(10) else "")
        await agent.start(FIRST)
        assert agent.get_terms().policy.enabled
        with ControlClient(server.address) as client:
            await asyncio.sleep(0.2)
            assert not client.get_status().engines, "an engine that does not know its weights yet would refuse a certified policy"
            done.set()
            await _until(lambda: len(client.get_status().engines) == 1)
            assert client.get_status().engines[0].engine.weights_sha256 == "1" * 64
        assert agent.layout.weights_sha256 == "1" * 64
        await agent.stop()
        await asyncio.to_thread(server.stop)

    asyncio.run(scenario())
