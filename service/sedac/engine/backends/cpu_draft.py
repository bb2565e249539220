"""Draft passes as one operator (kernels/draft.cpp), for decoder layers of the usual form.

The usual form: RMSNorm, one packed qkv projection (with per-head norms or without), rotary embedding in halves, attention, output
projection; RMSNorm, SwiGLU of two packed projections; dense weights in a form that `find_weights` knows. Everything else drafts as vLLM's modules
(drafting/model.py), which give the same tokens, slower. N drafting sequences, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sedac.engine.backends.base import DraftLayer
from sedac.engine.backends.cpu_mlp import CpuMlp
from sedac.engine.backends.neurons import find_activation
from sedac.engine.vllm.parts import Attention, RMSNorm, WeightForm, Weights, find_weights

_NONE = torch.empty(0)
_LAYERS = ("Qwen2DecoderLayer", "Qwen3DecoderLayer", "LlamaDecoderLayer", "MistralDecoderLayer")
"""Classes of vLLM's decoder layers that have no parts beside those of the usual form."""


class CpuDraftPass:
    """Runs the draft's layers as one operator; see `DraftPass` in base.py. They are registered once, and only the last ones made are known."""

    def __init__(self, layers: Sequence[DraftLayer], inner: Any, norm: nn.Module, target: Any, *, gated: bool) -> None:
        """See `Backend.make_draft_pass`.

        Raises:
            ValueError: a part is not of the usual form; says which.
        """
        self._embedding = _get_embedding(inner)
        self._norm, self._eps = _get_norm(norm, "norm")
        self._head = _get_head(target)
        self.num_outputs = target.config.vocab_size if self._head.tensor.numel() else 0
        """Logits per row. 0 means that `run` gives states, and that the model's own lm_head must follow."""
        parts = [_describe(layer, gated=gated) for layer in layers]
        torch.ops.sedac.draft_clear()
        for tensors, sizes, numbers, isa in parts:
            torch.ops.sedac.draft_add(tensors, sizes, numbers, isa)

    def run(self, ids_N: Tensor, positions_N: Tensor, metadata: Any) -> Tensor:
        """Return logits (N, V), or normed states (N, D) where the lm_head's weights are not known; `metadata` is the CPU backend's."""
        result: Tensor = torch.ops.sedac.draft_pass(
            ids_N, positions_N, metadata.slot_mapping, metadata.block_table, metadata.seq_lens, metadata.query_start_loc,
            metadata.scheduler_metadata, self._embedding, self._norm, self._eps, *self._head,
        )  # fmt: skip
        return result[:, : self.num_outputs] if self.num_outputs else result

    def fill(self, stream_TD: Tensor, positions_T: Tensor, slots_T: Tensor) -> None:
        """Write the head's keys and values of tokens whose stream the target has computed."""
        torch.ops.sedac.draft_fill(stream_TD, positions_T, slots_T)


def _get_head(target: Any) -> Weights:
    """Return the lm_head's weights, or an empty tensor where more than a product makes its logits."""
    lm_head, processor = getattr(target, "lm_head", None), getattr(target, "logits_processor", None)
    plain = getattr(processor, "scale", None) == 1.0 and getattr(processor, "soft_cap", 1.0) is None and getattr(lm_head, "bias", None) is None
    return (find_weights(lm_head) if plain else None) or Weights(_NONE, WeightForm.HANDLER)


def _get_embedding(inner: Any) -> Tensor:
    weight = getattr(getattr(inner, "embed_tokens", None), "weight", None)
    if weight is None or weight.dim() != 2 or not weight.numel():
        raise ValueError("the embedding is not a table `embed_tokens`")
    if hasattr(inner, "normalizer"):
        raise ValueError("the embedding is scaled")
    return weight.data


def _get_norm(norm: Any, name: str) -> tuple[Tensor, float]:
    if type(norm) is not RMSNorm or norm.variance_size_override is not None:
        raise ValueError(f"{name} is {type(norm).__name__}")
    return norm.weight.data, norm.variance_epsilon


def _take_weights(linear: Any, name: str) -> Weights:
    weights = find_weights(linear)
    if weights is None:
        raise ValueError(f"{name} has weights in a form that the kernels do not know")
    return weights


def _describe(layer: DraftLayer, *, gated: bool) -> tuple[list[Tensor], list[int], list[float], str]:
    """Return what `draft_add` takes of a layer."""
    module = layer.layer
    if not layer.is_head and not any(base.__name__ in _LAYERS for base in type(module).__mro__):
        raise ValueError(f"{type(module).__name__} is not among {', '.join(_LAYERS)}")
    tensors = [_NONE] * 12
    sizes, numbers, isa = [0, 0, 0, 0, -1, -1, 0, 0, 0, 0], [1.0, 0.0, 1e-6], ""
    if layer.attention is not None:
        tensors[0], numbers[2] = _get_norm(module.input_layernorm, "input_layernorm")
        isa = _describe_attention(layer.attention, tensors, sizes, numbers)
    if layer.mlp is not None:
        tensors[9], _ = _get_norm(module.post_attention_layernorm, "post_attention_layernorm")
        _describe_mlp(layer.mlp, tensors, sizes, gated=gated and not layer.is_head)
    return tensors, sizes, numbers, isa


def _describe_attention(block: Any, tensors: list[Tensor], sizes: list[int], numbers: list[float]) -> str:
    """Fill in the attention's part, and return the instruction set that its cache is laid out for."""
    attn: Attention = block.attn
    rotary = block.rotary_emb
    if not getattr(rotary, "is_neox_style", False) or rotary.cos_sin_cache.dim() != 2:
        raise ValueError(f"rotary embedding {type(rotary).__name__} is not in halves")
    if attn.kv_cache_dtype != "auto" or getattr(attn.impl, "alibi_slopes", None) is not None or getattr(attn.impl, "sinks", None) is not None:
        raise ValueError("attention has a quantised cache, alibi or sinks")
    if getattr(block, "attn_type", "decoder") != "decoder" or attn.impl.head_size % 32:
        raise ValueError("attention is no decoder's")
    tensors[1], sizes[6] = _take_weights(block.qkv_proj, "qkv_proj")
    tensors[2] = block.qkv_proj.bias.data if getattr(block.qkv_proj, "bias", None) is not None else _NONE
    for i, name in ((3, "q_norm"), (4, "k_norm")):
        if getattr(block, name, None) is not None and getattr(block, "qk_norm", True):
            tensors[i], _ = _get_norm(getattr(block, name), name)
    tensors[5] = rotary.cos_sin_cache.float().contiguous()
    if getattr(block.o_proj, "bias", None) is not None:
        raise ValueError("o_proj has a bias")
    tensors[6], sizes[7] = _take_weights(block.o_proj, "o_proj")
    blocks, kv_heads, size, _ = attn.kv_cache.shape
    tensors[7], tensors[8] = attn.kv_cache.view(blocks, kv_heads, size * 2, -1).chunk(2, dim=2)
    sizes[:3] = [attn.num_heads, attn.num_kv_heads, attn.head_size]
    sizes[4] = attn.impl.sliding_window
    numbers[0], numbers[1] = attn.impl.scale, float(attn.impl.logits_soft_cap)
    isa: str = attn.isa
    return isa


def _describe_mlp(mlp: Any, tensors: list[Tensor], sizes: list[int], *, gated: bool) -> None:
    """Fill in the MLP's part."""
    if find_activation(getattr(mlp, "act_fn", None)) != "silu":
        raise ValueError(f"{type(mlp).__name__} is no SwiGLU")
    if any(getattr(getattr(mlp, name), "bias", None) is not None for name in ("gate_up_proj", "down_proj")):
        raise ValueError("an MLP has biases")
    own = getattr(mlp, "sedac", None)
    known = own.weights if isinstance(own, CpuMlp) else {}
    for i, part in ((0, "gate_up"), (1, "down")):
        tensors[10 + i], sizes[8 + i] = known.get(part) or _take_weights(getattr(mlp, f"{part}_proj"), f"{part}_proj")
    sizes[3] = sum(mlp.gate_up_proj.output_partition_sizes) // 2
    if gated:
        if not (isinstance(own, CpuMlp) and own.has_kernels):
            raise ValueError("an MLP is not gated by the native kernels")
        sizes[5] = own.layer
