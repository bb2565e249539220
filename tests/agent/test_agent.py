"""The agent between a real control service and a real `State`: pushes, refusals, a service that goes away."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

import pytest
import torch
from prometheus_client import REGISTRY
from sedac.agent.agent import Agent
from sedac.agent.engine import AttachedEngine
from sedac.agent.metrics import EngineMetrics
from sedac.client.client import ControlClient
from sedac.control.v1 import control_pb2
from sedac.engine.state import State
from sedac.errors import PolicyInvalid
from sedac.policy import Checkpoint, Layout, Policy
from sedac.settings import EngineSettings

from tests.control.conftest import FIRST, RunningServer, settings  # noqa: F401  fixture

LAYOUT = Layout(num_layers=12, hidden_size=8, checkpoint_layers=(2, 5, 8), probe_set="demo")


class DirectClient:
    """Stands in for vLLM's engine client: calls two real `State`s, as two workers would be called."""

    def __init__(self) -> None:
        self.states = [State(LAYOUT, {}, max_num_tokens=4, device=torch.device("cpu")) for _ in range(2)]

    async def collective_rpc(self, method, timeout=None, args=()):  # noqa: ASYNC109  vLLM's signature
        return [getattr(self, f"_{method}")(state, *args) for state in self.states]

    def _sedac_describe(self, state):
        return asdict(state.layout)

    def _sedac_apply(self, state, policy, revision):
        try:
            state.apply(Policy.from_dict(policy), revision)
        except PolicyInvalid as error:
            return {"revision": state.revision, "violations": [[v.field, v.description] for v in error.violations]}
        return {"revision": revision, "violations": []}

    def _sedac_get_stats(self, state):
        return asdict(state.get_stats())


async def _make_agent(address: str, name: str, hello_layers=(2, 5, 8)) -> Agent:
    client = DirectClient()
    hello = control_pb2.EngineHello(engine_id=name, num_layers=12, hidden_size=8, checkpoint_layers=hello_layers, probe_set="demo")
    return Agent(
        engine=AttachedEngine(client=client),
        settings=EngineSettings(control_address=address, engine_id=name, poll_seconds=0.05),
        layout=LAYOUT,
        metrics=EngineMetrics(model_name=name, layout=LAYOUT),
        hello=hello,
    )


async def _until(condition, seconds=10.0):
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  the agent has nothing to wait for
            await asyncio.sleep(0.01)


def _get_metric(name: str, model: str, **labels) -> float | None:
    return REGISTRY.get_sample_value(name, {"model_name": model, "engine": "0", **labels})


def test_follows_refuses_and_outlives_the_service(settings):  # noqa: F811
    async def scenario() -> None:
        server = await asyncio.to_thread(RunningServer, settings)
        fixed = settings.model_copy(update={"port": server.server.port})
        # The service believes that layer 9 is attached, so that the engine's own check is what refuses.
        agent = await _make_agent(server.address, "follower", hello_layers=(2, 5, 8, 9))
        await agent.start(FIRST)
        assert agent.is_bounded()
        with ControlClient(server.address) as client:
            made = await asyncio.to_thread(client.update_policy, Policy(enabled=False))
            await _until(lambda: agent.revision == made.revision)
            assert not agent.is_bounded()
            assert {state.revision for state in agent.engine.client.states} == {made.revision}
            bad = Policy(enabled=True, checkpoints=(Checkpoint(layer=9, threshold=1),))
            await asyncio.to_thread(client.update_policy, bad)
            await _until(lambda: agent.refusal != "")
            assert "checkpoints[0].layer: 9 has no probe attached" in agent.refusal
            assert (agent.revision, agent.describe()["state"], agent.is_bounded()) == (made.revision, "NACKED", False)
            good = await asyncio.to_thread(client.update_policy, FIRST)
            await _until(lambda: agent.revision == good.revision)
            assert agent.describe()["state"] == "SYNCED"
        assert _get_metric("sedac_policy_updates_total", "follower", result="nack") == 1
        assert _get_metric("sedac_threshold", "follower", checkpoint="5") == 0.25
        await asyncio.to_thread(server.stop)
        await _until(lambda: agent.describe()["state"] == "STALE")
        await _until(lambda: _get_metric("sedac_control_connected", "follower") == 0)
        assert agent.revision == good.revision, "the last good policy stays"
        again = await asyncio.to_thread(RunningServer, fixed)
        await _until(lambda: agent.describe()["state"] == "SYNCED")
        await agent.stop()
        await asyncio.to_thread(again.stop)

    asyncio.run(scenario())


def test_a_first_policy_that_does_not_fit_stops_the_start():
    async def scenario() -> None:
        agent = await _make_agent("", "misfit")
        with pytest.raises(PolicyInvalid, match="3 has no probe attached"):
            await agent.start(Policy(enabled=True, checkpoints=(Checkpoint(layer=3, threshold=1),)))
        assert not agent.is_bounded()

    asyncio.run(scenario())
