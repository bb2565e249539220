"""Repairs of vLLM's CPU sampler: seeded prompts in pieces, and decoding at a temperature under speculation.

`_expand_kernel_impl` (vllm/utils/cpu_triton_utils.py, 0.32) writes the temperature, top_p and top_k of a batch with draft tokens
into a copy that it drops, and the sampler reads memory that nobody wrote. The worker calls `mend` before the first step; where
vLLM does it right, `mend` changes nothing. Greedy requests were never touched by this.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.triton_utils.dispatcher import KernelOverride
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

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


def can_verify(params: Any) -> bool:
    """Whether vLLM's rejection sampler applies all of a request's sampling parameters to draft tokens (sample/rejection_sampler.py, 0.32).

    The others are sampled without drafts, by the sampler that applies them all.
    """
    return params is not None and not params.min_p and not params.logit_bias


def mend_seeds(runner: Any) -> None:
    """Keep a seeded request whose prompt is read in pieces from ending the engine, on the CPU.

    What a piece samples is dropped, and the runner would turn the request's generator back by its offset (v1/worker/gpu_model_runner.py,
    `_bookkeeping_sync`, 0.32), which generators of the CPU do not have. Their state is kept over the sampling instead.
    """
    if not current_platform.is_cpu():
        return
    sample, bookkeep = runner._sample, runner._bookkeeping_sync

    def find_dropped() -> dict[int, torch.Generator]:
        """Return the generators of rows whose tokens are dropped, by row."""
        dropped = runner.discard_request_mask.np
        return {row: generator for row, generator in runner.input_batch.generators.items() if dropped[row]}

    def keep_states(*args: Any, **kwargs: Any) -> Any:
        """Sample, and give these generators back the states that they had."""
        states = [(generator, generator.get_state()) for generator in find_dropped().values()]
        result = sample(*args, **kwargs)
        for generator, state in states:
            generator.set_state(state)
        return result

    def hide_dropped(*args: Any, **kwargs: Any) -> Any:
        """Let vLLM do its bookkeeping without these generators."""
        dropped, generators = find_dropped(), runner.input_batch.generators
        for row in dropped:
            del generators[row]
        try:
            return bookkeep(*args, **kwargs)
        finally:
            generators.update(dropped)

    runner._sample, runner._bookkeeping_sync = keep_states, hide_dropped


def skip_empty_verification(runner: Any) -> None:
    """Give steps without any draft token to the usual sampler, which does the same with less.

    vLLM sends all steps of a speculating engine through the rejection sampler (v1/worker/gpu_model_runner.py, 0.32), prompts too, and there
    a request with top_k and no top_p ends the engine on the CPU: `apply_top_k_only` looks for the largest of no values. What such a
    step hands on depends on the batch's size alone, but for the places of the logits, and is made once.
    """
    sample, calculate = runner._sample, runner._calc_spec_decode_metadata

    @functools.cache
    def make_parts(num: int) -> dict[str, torch.Tensor]:
        """Return the metadata's parts for so many requests without drafts."""
        empty, rows_N = (torch.arange(n, dtype=torch.int32, device=runner.device) for n in (0, num))
        return {
            "draft_token_ids": empty, "cu_num_draft_tokens": torch.zeros_like(rows_N), "cu_num_sampled_tokens": rows_N + 1,
            "target_logits_indices": empty, "bonus_logits_indices": rows_N,
        }  # fmt: skip

    def calculate_step(num_draft_tokens: Any, cu_num_scheduled_tokens: Any) -> Any:
        """Return the metadata of a step, with kept parts where the step has no drafts."""
        if num_draft_tokens.any():
            return calculate(num_draft_tokens, cu_num_scheduled_tokens)
        last_N = async_tensor_h2d(cu_num_scheduled_tokens - 1, device=runner.device)
        return SpecDecodeMetadata(num_draft_tokens=num_draft_tokens.tolist(), logits_indices=last_N, **make_parts(len(num_draft_tokens)))

    def sample_step(logits: Any, metadata: Any) -> Any:
        """Sample, as without speculation where the step has no drafts."""
        return sample(logits, metadata if metadata is not None and metadata.max_spec_len else None)

    runner._sample, runner._calc_spec_decode_metadata = sample_step, calculate_step


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
