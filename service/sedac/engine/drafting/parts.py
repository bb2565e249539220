"""The drafting adapter: what drafts are built from of vLLM's, and where they reach into its runner; no other file of this room imports vLLM.

N drafting sequences, K draft tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sedac.engine.vllm.patches import named

with named():
    from vllm.compilation.backends import set_model_tag
    from vllm.compilation.decorators import support_torch_compile
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
    from vllm.model_executor.layers.rotary_embedding import get_rope
    from vllm.model_executor.model_loader.utils import process_weights_after_loading
    from vllm.utils.torch_utils import set_default_torch_dtype
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

__all__ = [
    "Attention",
    "CommonAttentionMetadata",
    "MergedColumnParallelLinear",
    "QKVParallelLinear",
    "RMSNorm",
    "RowParallelLinear",
    "SiluAndMul",
    "VllmConfig",
    "apply_top_k_top_p",
    "get_rope",
    "keep_draft_probs",
    "let_drafter_choose",
    "process_weights_after_loading",
    "set_current_vllm_config",
    "set_default_torch_dtype",
    "set_forward_context",
    "set_model_tag",
    "support_torch_compile",
]


def let_drafter_choose(runner: Any) -> None:
    """Have the drafter asked in every step: SEDAC's bounds lengths by sequence, where vLLM would leave a whole batch out."""
    runner._input_fits_in_drafter = lambda metadata: metadata is not None


def keep_draft_probs(runner: Any, probs_NKV: Tensor, request_ids: list[str]) -> None:
    """Hand the verifier what the next step's draft tokens were drawn from, by drafting request and position, fp32."""
    runner._draft_probs, runner._draft_prob_req_ids = probs_NKV, request_ids
