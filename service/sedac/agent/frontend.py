"""The endpoint adapter: all that the agent takes of vLLM's front end and reaches into there; no other file of this room imports vLLM.

Hooks vLLM's input processor (v1/engine/input_processor.py, 0.32) and output processor (v1/engine/output_processor.py). The rows of
engine/vllm/patches.py under `front end` say what is expected of them; they have been checked when the engine was configured.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, fields
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import FinishReason
from vllm.v1.engine.logprobs import LogprobsProcessor

__all__ = [
    "FinishReason",
    "KeptLogprobs",
    "VLLMValidationError",
    "call_ranks",
    "hook_inputs",
    "hook_outputs",
    "is_first_server",
    "is_only_server",
    "make_prefill",
    "share_log",
]


def is_first_server(vllm_config: Any) -> bool:
    """Whether this API server is the first of its engine's, or the only one."""
    return bool(vllm_config.parallel_config._api_process_rank <= 0)


def is_only_server(vllm_config: Any) -> bool:
    """Whether this API server is the only one of its engine's, so that every request passes it."""
    return bool(vllm_config.parallel_config._api_process_count == 1)


def share_log() -> None:
    """Let the agent's lines out where vLLM's go, where a library has set up the root logger for warnings alone (engine/vllm/plugin.py gives way)."""
    ours, theirs = logging.getLogger("sedac"), logging.getLogger("vllm")
    if not ours.handlers and not ours.isEnabledFor(theirs.getEffectiveLevel()):
        ours.handlers, ours.propagate = list(theirs.handlers), False
        ours.setLevel(theirs.getEffectiveLevel())


async def call_ranks(client: Any, method: str, timeout_seconds: float, args: tuple[Any, ...]) -> list[list[Any]]:
    """Call a method of every worker and return the answers by data-parallel rank.

    `collective_rpc` returns one rank's answers, and before a load balancer of vLLM's own reaches no other (v1/engine/core_client.py,
    0.32: `call_utility_async`); its `call_utility_all_async` reaches every rank that this API server talks to.
    """
    core: Any = getattr(client, "engine_core", None)
    if len(getattr(core, "core_engines", ())) > 1 and hasattr(core, "call_utility_all_async"):
        found: list[list[Any]] = await core.call_utility_all_async("collective_rpc", method, timeout_seconds, args, None)
        return found
    return [await client.collective_rpc(method, timeout_seconds, args)]


def make_prefill(tokens: list[int], *, cache_salt: str, extra: dict[str, Any]) -> tuple[Any, SamplingParams]:
    """Return the prompt and the parameters of a request that reads tokens for their log-probabilities and generates one."""
    params = SamplingParams(
        max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, extra_args=extra
    )
    return tokens_input(tokens, cache_salt=cache_salt), params


def hook_inputs(input_processor: Any, on_request: Callable[[Any], None]) -> None:
    """Call `on_request` with every `EngineCoreRequest` that passes vLLM's input processor, raw or rendered, before the engine gets it."""
    process: Callable[..., Any] = input_processor.process_inputs
    process_async: Callable[..., Awaitable[Any]] = input_processor.process_inputs_async

    @functools.wraps(process)
    def process_inputs(*args: Any, **kwargs: Any) -> Any:
        """Let vLLM process a request, and tell `on_request` of it."""
        request = process(*args, **kwargs)
        on_request(request)
        return request

    async def process_inputs_async(*args: Any, **kwargs: Any) -> Any:
        """Let vLLM process a request, and tell `on_request` of it."""
        request = await process_async(*args, **kwargs)
        on_request(request)
        return request

    input_processor.process_inputs = process_inputs
    input_processor.process_inputs_async = process_inputs_async


def hook_outputs(output_processor: Any, on_begin: Callable[[Any, Any], None], on_finish: Callable[[Any, FinishReason], None]) -> None:
    """Call `on_begin` (request, its state) for every choice before the engine has it, `on_finish` (state, reason) when it has finished.

    What its client gave up never finishes.
    """
    add, finish = output_processor.add_request, output_processor._update_stats_from_finished

    @functools.wraps(add)
    def add_request(request: Any, *args: Any, **kwargs: Any) -> None:
        """Let vLLM add a request, and tell `on_begin` of a new one."""
        is_new = request.request_id not in output_processor.request_states
        add(request, *args, **kwargs)
        if is_new:
            on_begin(request, output_processor.request_states[request.request_id])

    @functools.wraps(finish)
    def update_stats_from_finished(state: Any, reason: Any, stats: Any) -> None:
        """Let vLLM count a finished request, and tell `on_finish` of it."""
        finish(state, reason, stats)
        on_finish(state, reason)

    output_processor.add_request = add_request
    output_processor._update_stats_from_finished = update_stats_from_finished


@dataclass
class KeptLogprobs(LogprobsProcessor):
    """vLLM's own processor, which besides keeps the chosen tokens and their log-probabilities; hides them where nobody else asked."""

    is_hidden: bool = False
    token_ids: list[int] = field(default_factory=list)
    chosen: list[float] = field(default_factory=list)

    @classmethod
    def wrap(cls, inner: LogprobsProcessor, *, is_hidden: bool) -> KeptLogprobs:
        """Take a fresh processor's place; hidden, it answers as if no log-probabilities had been asked for."""
        known = {f.name: getattr(inner, f.name) for f in fields(LogprobsProcessor)}
        if is_hidden:
            known |= {"logprobs": None, "cumulative_logprob": None, "num_logprobs": None}
        return cls(**known, is_hidden=is_hidden)

    def _update_sample_logprobs(self, logprobs_lists: Any) -> None:
        self.token_ids += logprobs_lists.logprob_token_ids[:, 0].tolist()  # the sampled token comes first (v1/sample/sampler.py)
        self.chosen += logprobs_lists.logprobs[:, 0].tolist()
        if not self.is_hidden:
            super()._update_sample_logprobs(logprobs_lists)
