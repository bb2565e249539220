"""The checkpoint: after a decoder layer, hand the residual stream to the `State`, in eager mode and under torch.compile.

`attach` swaps a decoder layer's class for one whose forward ends with the checkpoint; weights and names stay.
T tokens, D hidden size.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from sedac.engine.step.state import State
from sedac.engine.vllm.parts import direct_register_custom_op

_STATES: dict[str, State] = {}
"""States by layer name, because operators can carry names, not objects."""


def _checkpoint(stream_TD: Tensor, level_T: Tensor, layer: int, layer_name: str) -> None:
    _STATES[layer_name].observe(layer, stream_TD)


def _checkpoint_fake(stream_TD: Tensor, level_T: Tensor, layer: int, layer_name: str) -> None:
    return None


# `level_T` is written through the State; naming it here orders this operator before the MLPs that read it.
direct_register_custom_op("sedac_checkpoint", _checkpoint, mutates_args=["level_T"], fake_impl=_checkpoint_fake)


class Checkpoint:
    """What a decoder layer with a checkpoint keeps, as `layer.sedac`."""

    def __init__(self, layer: int, name: str, state: State) -> None:
        """`name` of the decoder layer in the model."""
        self.layer, self.name, self.state = layer, name, state
        self.index = state.index_of_layer[layer]
        self.is_recorded = state.recorder is not None
        """Whether the state itself must see the stream."""


@functools.cache
def _with_checkpoint(base: Any) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the layer, and hand the residual stream after it to the state."""
        hidden_TD, residual_TD = base.forward(self, *args, **kwargs)
        checkpoint: Checkpoint = self.sedac
        if torch.compiler.is_compiling():
            # The sum, not its parts: handing `residual` itself to an opaque operator would make the compiler round it to
            # bf16 where plain vLLM keeps it in fp32 between two fused kernels, and idle would no longer equal plain.
            checkpoint.state.backend.trace_observe(hidden_TD.float() + residual_TD.float(), self.sedac_level_T, checkpoint)
        elif checkpoint.state.is_watching():
            checkpoint.state.observe(checkpoint.layer, hidden_TD, residual_TD)
        return hidden_TD, residual_TD

    return type(f"Checkpointed{base.__name__}", (base,), {"forward": forward, "__module__": base.__module__})


def attach(layer: Any, index: int, name: str, state: State) -> None:
    """Put a checkpoint behind the decoder layer `index`, called `name` in the model."""
    _STATES[name] = state
    layer.sedac = Checkpoint(index, name, state)
    layer.register_buffer("sedac_level_T", state.level_T, persistent=False)
    base: Any = type(layer)
    layer.__class__ = _with_checkpoint(base)
