"""A draft's own layers, built from vLLM's parts: they follow the decoder layer's contract and stand after the target's layers.

T tokens, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sedac.engine.drafting.parts import (
    Attention,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RMSNorm,
    RowParallelLinear,
    SiluAndMul,
    VllmConfig,
    get_rope,
    support_torch_compile,
)
from sedac.probe.draft import DraftManifest


class HeadLayer(nn.Module):
    """The draft's layer: attention with its own KV cache where the manifest has heads, then a SwiGLU where it has neurons."""

    def __init__(self, manifest: DraftManifest, vllm_config: VllmConfig, prefix: str) -> None:
        """`prefix` must hold one layer number of its own, from which vLLM tells KV caches apart."""
        super().__init__()
        m = self.manifest = manifest
        size, eps = m.hidden_size, m.rms_norm_eps
        self.has_attention, self.has_mlp = bool(m.num_heads), bool(m.intermediate_size)
        if self.has_attention:
            self.input_layernorm = RMSNorm(size, eps=eps)
            self.qkv_proj = QKVParallelLinear(size, m.head_size, m.num_heads, m.num_kv_heads, bias=False, prefix=f"{prefix}.qkv_proj")
            self.o_proj = RowParallelLinear(m.num_heads * m.head_size, size, bias=False, prefix=f"{prefix}.o_proj")
            self.rotary_emb = get_rope(
                m.head_size,
                max_position=vllm_config.model_config.max_model_len,
                rope_parameters={"rope_theta": m.rope_theta, "rope_type": "default"},
            )
            self.attn = Attention(
                m.num_heads,
                m.head_size,
                m.head_size**-0.5,
                num_kv_heads=m.num_kv_heads,
                cache_config=vllm_config.cache_config,
                prefix=f"{prefix}.attn",
            )
            self.sizes = [m.num_heads * m.head_size, m.num_kv_heads * m.head_size, m.num_kv_heads * m.head_size]
        if self.has_mlp:
            self.post_attention_layernorm = RMSNorm(size, eps=eps)
            self.gate_up_proj = MergedColumnParallelLinear(size, [m.intermediate_size] * 2, bias=False, prefix=f"{prefix}.gate_up_proj")
            self.down_proj = RowParallelLinear(m.intermediate_size, size, bias=False, prefix=f"{prefix}.down_proj")
            self.act_fn = SiluAndMul()

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The decoder layer's contract."""
        if self.has_attention:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
            qkv, _ = self.qkv_proj(hidden_states)
            q, k, v = qkv.split(self.sizes, dim=-1)
            q, k = self.rotary_emb(positions, q, k)
            hidden_states, _ = self.o_proj(self.attn(q, k, v))
        if self.has_mlp:
            hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
            gate_up, _ = self.gate_up_proj(hidden_states)
            hidden_states, _ = self.down_proj(self.act_fn(gate_up))
        return hidden_states, residual

    def write_cache(self, keys: Tensor, values: Tensor, slots_T: Tensor) -> None:
        """Write what `HeadCache` made of tokens that the target has computed into the layer's own cache."""
        attn: Any = self.attn
        shape = (-1, attn.num_kv_heads, attn.head_size)
        attn.impl.do_kv_cache_update(attn, keys.view(shape), values.view(shape), attn.kv_cache, slots_T)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Copy the weights of the artifact, whose names are `DraftHead`'s."""
        if self.has_attention:
            for part in ("q", "k", "v"):
                self.qkv_proj.weight_loader(self.qkv_proj.weight, weights[f"{part}_proj.weight"], part)
            self.o_proj.weight_loader(self.o_proj.weight, weights["o_proj.weight"])
            self.input_layernorm.weight.data.copy_(weights["input_layernorm.weight"])
        if self.has_mlp:
            for i, part in enumerate(("gate", "up")):
                self.gate_up_proj.weight_loader(self.gate_up_proj.weight, weights[f"{part}_proj.weight"], i)
            self.down_proj.weight_loader(self.down_proj.weight, weights["down_proj.weight"])
            self.post_attention_layernorm.weight.data.copy_(weights["post_attention_layernorm.weight"])


@support_torch_compile(dynamic_arg_dims={"positions": -1, "stream": 0})
class HeadCache(nn.Module):
    """The head layer's keys and values, compiled on their own: (T,) positions and the stream (T, D) to two (T, kv heads x head size)."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", head: HeadLayer) -> None:
        super().__init__()
        self.input_layernorm, self.qkv_proj, self.rotary_emb, self.sizes = head.input_layernorm, head.qkv_proj, head.rotary_emb, head.sizes

    def forward(self, positions: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys, rotated, and values."""
        qkv, _ = self.qkv_proj(self.input_layernorm(stream))
        _, keys, values = qkv.split(self.sizes, dim=-1)
        keys, _ = self.rotary_emb(positions, keys)
        return keys.contiguous(), values.contiguous()


class Nothing(nn.Module):
    """In the place of an attention or MLP that a draft leaves out: adds nothing to the stream."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Return zeros in the form of the states."""
        return torch.zeros_like(kwargs["hidden_states"] if "hidden_states" in kwargs else args[-1])
