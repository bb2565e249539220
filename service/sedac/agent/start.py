"""Starts the agent beside an engine that has SEDAC attached: who it is, what it promises, audits and watches. Called by plugin.py, once."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from typing import Any

from sedac import __version__
from sedac.agent import promise
from sedac.agent.agent import Agent
from sedac.agent.audits import Auditor
from sedac.agent.engine import AttachedEngine
from sedac.agent.frontend import is_first_server, is_only_server, share_log
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


async def start(engine_client: Any, model_name: str) -> Agent | None:
    """Put the first policy into force, and the control service's where that can be reached; None: another API server runs the agent.

    `engine_client`: vLLM's (EngineClient).
    """
    share_log()
    settings = read_settings()
    manifest = read_manifest(settings.probe_dir)
    first = settings.make_policy(manifest)
    vllm_config = engine_client.vllm_config
    if not is_first_server(vllm_config):
        exact = Terms(policy=replace(first, enabled=False), levels=(FULL, SKIP, *(level.name for level in manifest.levels)))
        promise.install(engine_client.input_processor, lambda: exact)
        return None
    engine = AttachedEngine(client=engine_client)
    layout = replace(await engine.describe(), probe_set_sha256=manifest.sha256)
    metrics = EngineMetrics(model_name=model_name, layout=layout, is_speculating=vllm_config.speculative_config is not None)
    agent = Agent(
        engine=engine,
        settings=settings,
        layout=layout,
        metrics=metrics,
        hello=_make_hello(settings, engine, layout, model_name, first),
        find_weights=functools.partial(_find_weights, vllm_config),
        faster_rows=await engine.get_faster_rows(),
        auditor=_make_auditor(engine_client, metrics),
    )
    _watch(engine_client, agent)
    await agent.start(first)
    promise.install(engine_client.input_processor, agent.get_terms)
    await agent.join()
    return agent


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
    if is_only_server(engine_client.vllm_config):  # else it does not see what the others are asked for
        agent.take_activity = watch.take_activity


def _find_weights(vllm_config: Any) -> str:
    """Return the digest of the weights that vLLM loaded; blocks while it reads files.

    Raises:
        ConfigError: they were not read from a directory or the hub's cache.
    """
    model, load = vllm_config.model_config, vllm_config.load_config
    if load.load_format == "dummy":
        raise ConfigError("the engine was started with --load-format dummy and has random weights")
    return get_weights_digest(model.model, revision=model.revision, cache_dir=load.download_dir)
