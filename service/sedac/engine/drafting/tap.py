"""The tap: after one decoder layer, keep the residual stream of the step for the draft's head, in eager mode and under torch.compile.

T tokens, D hidden size.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from sedac.engine.vllm.parts import direct_register_custom_op


def _tap(stream_TD: Tensor, kept_TD: Tensor) -> None:
    kept_TD[: stream_TD.shape[0]].copy_(stream_TD)


def _tap_fake(stream_TD: Tensor, kept_TD: Tensor) -> None:
    return None


direct_register_custom_op("sedac_tap", _tap, mutates_args=["kept_TD"], fake_impl=_tap_fake)


@functools.cache
def _with_tap(base: Any) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the layer, and keep the residual stream after it."""
        hidden_TD, residual_TD = base.forward(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            # the sum in fp32, for the reason given in engine/step/checkpoint.py
            torch.ops.vllm.sedac_tap(hidden_TD.float() + residual_TD.float(), self.sedac_stream_TD)
        else:
            torch.add(hidden_TD, residual_TD, out=self.sedac_stream_TD[: hidden_TD.shape[0]])
        return hidden_TD, residual_TD

    return type(f"Tapped{base.__name__}", (base,), {"forward": forward, "__module__": base.__module__})


def attach(layer: Any, num_tokens: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Put a tap behind a decoder layer; returns where it keeps the stream (T, D) of the last pass."""
    layer.register_buffer("sedac_stream_TD", torch.zeros(num_tokens, hidden_size, dtype=dtype, device=device), persistent=False)
    base: Any = type(layer)
    layer.__class__ = _with_tap(base)
    kept: Tensor = layer.sedac_stream_TD
    return kept
