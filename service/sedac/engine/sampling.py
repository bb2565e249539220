"""Repairs of vLLM's CPU sampler: seeded prompts in pieces, and decoding at a temperature under speculation.

`_expand_kernel_impl` (vllm/utils/cpu_triton_utils.py, 0.32) writes the temperature, top_p and top_k of a batch with draft tokens
into a copy that it drops, and the sampler reads memory that nobody wrote. The worker calls `mend` before the first step; where
vLLM does it right, `mend` changes nothing. Greedy requests were never touched by this.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.triton_utils.dispatcher import KernelOverride

_log = logging.getLogger(__name__)


def expand(output: Tensor, values: Tensor, ends: Tensor, replace_from: float, replace_to: float, max_num_tokens: int | None = None) -> None:
    """Write each request's value (N,) to its tokens in `output` (T,), which end before `ends` (N,); one value may stand for another."""
    counts = torch.diff(ends.long(), prepend=ends.new_zeros(1).long())
    replaced = torch.where(values == replace_from, torch.as_tensor(replace_to, dtype=values.dtype), values)
    output.copy_(torch.repeat_interleave(replaced, counts))


def is_sound() -> bool:
    """Whether vLLM's sampler hands each draft token its request's temperature."""
    from vllm.v1.sample import rejection_sampler

    output = torch.full((3,), math.nan)
    rejection_sampler._expand(output, torch.tensor([0.5, 2.0]), torch.tensor([1, 3], dtype=torch.int32), 0, 1)
    return output.tolist() == [0.5, 2.0, 2.0]


def mend_seeds(runner: Any) -> None:
    """Keep a seeded request whose prompt is read in pieces from ending the engine, on the CPU.

    What a piece samples is dropped, and the runner would turn the request's generator back by its offset (v1/worker/gpu_model_runner.py,
    `_bookkeeping_sync`, 0.32), which generators of the CPU do not have. Their state is kept over the sampling instead.
    """
    if not current_platform.is_cpu():
        return
    sample, bookkeep = runner._sample, runner._bookkeeping_sync

    def find_dropped() -> dict[int, torch.Generator]:
        dropped = runner.discard_request_mask.np
        return {row: generator for row, generator in runner.input_batch.generators.items() if dropped[row]}

    def keep_states(*args: Any, **kwargs: Any) -> Any:
        states = [(generator, generator.get_state()) for generator in find_dropped().values()]
        result = sample(*args, **kwargs)
        for generator, state in states:
            generator.set_state(state)
        return result

    def hide_dropped(*args: Any, **kwargs: Any) -> Any:
        dropped, generators = find_dropped(), runner.input_batch.generators
        for row in dropped:
            del generators[row]
        try:
            return bookkeep(*args, **kwargs)
        finally:
            generators.update(dropped)

    runner._sample, runner._bookkeeping_sync = keep_states, hide_dropped


def mend() -> None:
    """Put `expand` in the place of vLLM's kernel on the CPU, if that one is broken.

    Raises:
        RuntimeError: vLLM's sampler is broken in another way.
    """
    if not current_platform.is_cpu() or is_sound():
        return
    from vllm.v1.sample import rejection_sampler

    # Not register_kernels: it walks over all loaded modules and stumbles over some of those that a running engine has.
    if isinstance(rejection_sampler.expand_kernel, KernelOverride):
        rejection_sampler.expand_kernel._impl = expand
    if not is_sound():
        raise RuntimeError("vLLM's sampler loses the temperature of draft tokens on the CPU and could not be repaired: serve without speculation")
    _log.info("repaired vLLM's sampling of draft tokens on the CPU (temperature, top_p and top_k were lost)")
