"""Entry point of `vllm.endpoint_plugins`: starts the agent in the API server and adds its routes.

GET /sedac/status says what is attached and in force, GET /sedac/v1/requests/{id} what a response was computed with.
vLLM loads it only where VLLM_PLUGINS names `sedac_agent`. With several API servers only the first runs an agent; the others
know no policy and promise every request to be exact. Without an engine (render server) it does nothing.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from argparse import Namespace
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from starlette.datastructures import State

from sedac import __version__
from sedac.agent import promise
from sedac.agent.agent import Agent
from sedac.agent.audits import Auditor
from sedac.agent.engine import AttachedEngine
from sedac.agent.metrics import EngineMetrics
from sedac.agent.promise import Terms
from sedac.agent.watch import Watch
from sedac.contract import wire
from sedac.contract.v1 import control_pb2
from sedac.errors import ConfigError
from sedac.policy.layout import Layout
from sedac.policy.model import FULL, SKIP, Policy
from sedac.policy.weights import get_weights_digest
from sedac.probe.manifest import read_manifest
from sedac.settings import EngineSettings, read_settings
from sedac.versions import CAPABILITIES, find_vllm_version

_log = logging.getLogger(__name__)
_MAX_ID_CHARS = 256


class AgentPlugin:
    """vLLM's endpoint-plugin interface (plugins/endpoint_plugins/interface.py, 0.32)."""

    name = "sedac_agent"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, and stop the agent when the application stops (the interface has no hook for that)."""
        inner = app.router.lifespan_context

        @contextlib.asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
            async with inner(app) as state:
                try:
                    yield state
                finally:
                    agent = getattr(app.state, "sedac_agent", None)
                    if agent is not None:
                        await agent.stop()

        app.router.lifespan_context = lifespan

        @app.get("/sedac/status")
        async def status(request: Request) -> dict[str, Any]:
            """Return what is attached, the policy in force and the counters."""
            agent: Agent | None = getattr(request.app.state, "sedac_agent", None)
            return agent.describe() if agent else {"state": "NOT_ATTACHED"}

        @app.get("/sedac/v1/requests/{request_id}")
        async def report(request_id: str, request: Request) -> dict[str, Any]:
            """Return what the response of that id was computed with: tier, whether certified, policy revision, tokens, MLPs and their share."""
            agent: Agent | None = getattr(request.app.state, "sedac_agent", None)
            if agent is None:
                raise HTTPException(404, "this API server runs no SEDAC agent; ask the first one")
            try:
                found = await agent.engine.find_report(request_id[:_MAX_ID_CHARS])
            except TimeoutError as error:
                raise HTTPException(503, "the workers did not answer in time; ask again") from error
            if found is None:
                known = "the id of a response, such as cmpl-... or chatcmpl-..., while it runs and until 1,000 others have finished"
                raise HTTPException(404, f"request {request_id[:_MAX_ID_CHARS]!r} is unknown or forgotten; give {known}")
            return found

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Put the first policy into force, and the control service's where that can be reached, before the server answers."""
        state.sedac_agent = None
        if engine_client is None:
            return
        _share_vllm_log()
        settings = read_settings()
        manifest = read_manifest(settings.probe_dir)
        first = settings.make_policy(manifest)
        if engine_client.vllm_config.parallel_config._api_process_rank > 0:
            exact = Terms(policy=replace(first, enabled=False), levels=(FULL, SKIP, *(level.name for level in manifest.levels)))
            promise.install(engine_client.input_processor, lambda: exact)
            return
        engine = AttachedEngine(client=engine_client)
        layout = replace(await engine.describe(), probe_set_sha256=manifest.sha256)
        model_name = state.openai_serving_models.base_model_paths[0].name
        vllm_config = engine_client.vllm_config
        metrics = EngineMetrics(model_name=model_name, layout=layout, is_speculating=vllm_config.speculative_config is not None)
        agent = Agent(
            engine=engine,
            settings=settings,
            layout=layout,
            metrics=metrics,
            hello=_make_hello(settings, engine, layout, model_name, first),
            find_weights=functools.partial(_find_weights, vllm_config),
            auditor=_make_auditor(engine_client, metrics),
        )
        _watch(engine_client, agent)
        await agent.start(first)
        promise.install(engine_client.input_processor, agent.get_terms)
        await agent.join()
        state.sedac_agent = agent


def _share_vllm_log() -> None:
    """Let the agent's lines out where vLLM's go, where a library has set up the root logger for warnings alone (engine/vllm/plugin.py gives way)."""
    ours, theirs = logging.getLogger("sedac"), logging.getLogger("vllm")
    if not ours.handlers and not ours.isEnabledFor(theirs.getEffectiveLevel()):
        ours.handlers, ours.propagate = list(theirs.handlers), False
        ours.setLevel(theirs.getEffectiveLevel())


def _make_hello(settings: EngineSettings, engine: AttachedEngine, layout: Layout, model_name: str, first: Policy) -> control_pb2.EngineHello:
    return control_pb2.EngineHello(
        engine_id=settings.engine_id,
        model=model_name,
        vllm_version=find_vllm_version(),
        sedac_version=__version__,
        num_layers=layout.num_layers,
        hidden_size=layout.hidden_size,
        checkpoint_layers=layout.checkpoint_layers,
        probe_set=layout.probe_set,
        levels=layout.levels,
        probe_set_sha256=layout.probe_set_sha256,
        num_workers=engine.num_workers,
        initial_policy=wire.policy_to_proto(first),
        max_rank=layout.max_rank,
        levels_sha256=layout.levels_sha256,
        data_parallel_size=engine.num_ranks,
        draft=layout.draft,
        max_draft_tokens=layout.max_draft_tokens,
        capabilities=CAPABILITIES,
    )


def _make_auditor(engine_client: Any, metrics: EngineMetrics) -> Auditor | None:
    """Return what audits answers; None where this engine's log-probabilities say nothing, because they are not the raw ones of all tokens."""
    model = engine_client.vllm_config.model_config
    if model.logprobs_mode != "raw_logprobs" or engine_client.vllm_config.cache_config.kv_sharing_fast_prefill:
        _log.warning("no answer is audited with --logprobs-mode %s or --kv-sharing-fast-prefill; audit.share has no effect", model.logprobs_mode)
        return None
    return Auditor(client=engine_client, max_model_len=model.max_model_len, on_result=metrics.evidence.add_result)


def _watch(engine_client: Any, agent: Agent) -> None:
    auditor = agent.auditor
    watch = Watch(
        find_book=agent.find_book,
        on_latency=agent.metrics.evidence.add_latency,
        on_answer=auditor.add if auditor else lambda page, answer: None,
        is_own=auditor.is_own if auditor else lambda request_id: False,
        has_processors=bool(engine_client.vllm_config.model_config.logits_processors),
    )
    watch.install(engine_client.output_processor)


def _find_weights(vllm_config: Any) -> str:
    """Return the digest of the weights that vLLM loaded; blocks while it reads files.

    Raises:
        ConfigError: they were not read from a directory or the hub's cache.
    """
    model, load = vllm_config.model_config, vllm_config.load_config
    if load.load_format == "dummy":
        raise ConfigError("the engine was started with --load-format dummy and has random weights")
    return get_weights_digest(model.model, revision=model.revision, cache_dir=load.download_dir)
