"""Real agents with recorded workers in place of an engine: all that engines and the control service say to each other is real."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from sedac.agent.agent import Agent
from sedac.agent.engine import AttachedEngine
from sedac.agent.metrics import EngineMetrics
from sedac.contract import wire
from sedac.contract.v1 import control_pb2
from sedac.errors import ConfigError
from sedac.settings import EngineSettings

from testing.control.engines import FIRST
from testing.workers import Workers


class RecordedWorkers(Workers):
    """Workers that remember which revisions they were told to apply, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.applied: list[int] = []

    async def collective_rpc(self, method, timeout=None, args=()):  # noqa: ASYNC109  vLLM's signature
        answers = await super().collective_rpc(method, timeout, args)
        if method == "sedac_apply" and not any(answer["violations"] for answer in answers):
            self.applied.append(args[1])
        return answers


def _refuse_weights() -> str:
    raise ConfigError("recorded workers have no weights")


async def make_agent(address: str, name: str) -> Agent:
    """An agent that is not started yet; FIRST is what it brings."""
    engine = AttachedEngine(client=RecordedWorkers())
    layout = replace(await engine.describe(), probe_set_sha256="2" * 64)
    return Agent(
        engine=engine,
        settings=EngineSettings(control_address=address, engine_id=name, poll_seconds=0.05),
        layout=layout,
        metrics=EngineMetrics(model_name=name, layout=layout),
        hello=control_pb2.EngineHello(engine_id=name, initial_policy=wire.policy_to_proto(FIRST), **vars(layout)),
        find_weights=_refuse_weights,
    )


async def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for what nobody announces."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
