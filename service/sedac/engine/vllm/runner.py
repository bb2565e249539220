"""vLLM's worker and model runner as SEDAC's worker sees them: the class to extend, the running batch, where a step begins and ends.

Importing this checks vLLM: only a worker that SEDAC was asked for does, before weights are loaded.
N requests of the step, T its tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sedac.engine.vllm import patches

with patches.named():
    patches.refuse("every process", "worker")
    from vllm.forward_context import get_forward_context
    from vllm.platforms import current_platform
    from vllm.v1.outputs import ModelRunnerOutput

if TYPE_CHECKING or current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as BaseWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as BaseWorker

__all__ = [
    "BaseWorker",
    "ModelRunnerOutput",
    "StepBatch",
    "get_next_tokens",
    "get_slot_mapping",
    "read_batch",
    "wrap_forward",
]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """The running step's requests, in the order of their rows; views of vLLM's own arrays, good until the next step."""

    request_ids: list[str]
    bounds: Array
    """First rows of the requests, and the end, (N + 1,)."""
    starts: Array
    """Tokens computed before this step, (N,)."""
    num_prompt: Array
    """Tokens of the prompts, (N,)."""


def read_batch(runner: Any) -> StepBatch:
    """Return what the runner is about to compute."""
    batch = runner.input_batch
    num = batch.num_reqs
    return StepBatch(
        request_ids=batch.req_ids,
        bounds=runner.query_start_loc.np[: num + 1],
        starts=batch.num_computed_tokens_cpu[:num],
        num_prompt=batch.num_prompt_tokens[:num],
    )


def get_next_tokens(runner: Any, index: int, start: int, count: int, unknown: int) -> Tensor:
    """Return the tokens that follow `count` rows of request `index` from position `start` on, else `unknown`: int64 (count,)."""
    batch = runner.input_batch
    known = int(batch.num_tokens_no_spec[index])
    next_T = torch.full((count,), unknown)
    found = torch.from_numpy(batch.token_ids_cpu[index, start + 1 : min(start + 1 + count, known)].copy())
    next_T[: len(found)] = found.long()
    return next_T


def get_slot_mapping() -> Any:
    """Return the slots of the running pass's tokens, by layer name."""
    return get_forward_context().slot_mapping


def wrap_forward(runner: Any, forward: Callable[..., Any]) -> None:
    """Let every forward pass of the runner's model go through `forward(inner, **inputs)`."""
    runner._model_forward = functools.partial(forward, runner._model_forward)
