"""The neuron-major weights of one MLP, which reduced levels read, and what is known of its neurons and its activation.

F neurons of an MLP (of this rank's share), D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sedac.probe.levels import Neurons

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
"""Number that the kernels have for each activation."""


@dataclass(kw_only=True)
class NeuronWeights:
    """One MLP's weights with a row per neuron, in order of importance: the copy that reduced levels read."""

    gate_FD: Tensor
    up_FD: Tensor
    down_FD: Tensor
    """Each row is its neuron's column of the down projection, repaired where the probe set says so."""
    scale_F: Tensor
    """Scales in order of importance, fp32. The score is abs(gate) * scale."""
    order_F: Tensor
    """The model's own neuron (of this rank) of each row, int64."""
    repaired: bool
    activation: str
    scores_activation: bool


def sort_neurons(neurons: Neurons, rank: int, world_size: int) -> tuple[Tensor, dict[int, int]]:
    """Return this rank's neurons in order of importance (local numbers, int64) and how many of the leading k are its own, by k."""
    order_F = neurons.order_F.long()
    size = order_F.numel() // world_size
    mine_F = (order_F >= rank * size) & (order_F < (rank + 1) * size)
    totals = mine_F.cumsum(0).tolist()
    counts = {} if world_size == 1 else {k + 1: int(total) for k, total in enumerate(totals)}
    return order_F[mine_F] - rank * size, counts


def find_activation(act_fn: Any) -> str | None:
    """Return the name in ACTIVATIONS of vLLM's gated activation module; None where it is another one."""
    name = type(act_fn).__name__
    if name == "SiluAndMul":
        return "silu"
    if name == "GeluAndMul":
        return "gelu_tanh" if getattr(act_fn, "approximate", "none") == "tanh" else "gelu"
    return None
