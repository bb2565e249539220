"""Reduced levels as a probe set carries them, and the naive form of each reduction.

`reduce_mlp` says what a level means, neuron by neuron; the engine's kernels are tested against it and the workshop measures
with it. L layers, F neurons (intermediate size), D hidden size, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Reduction = Literal["width", "contextual"]
Score = Literal["gate", "activation"]
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


@dataclass(frozen=True, kw_only=True)
class Level:
    """One row of the level table: how much of every layer's MLP a token gets."""

    name: str
    reduction: Reduction
    parameters_L: Tensor
    """For `width`: leading neurons by importance, int32 (F: all, 0: none). For `contextual`: threshold of the score, float32 (0: all, inf: none)."""


@dataclass(frozen=True, kw_only=True)
class Neurons:
    """What calibration knows about one layer's neurons, in the model's own order."""

    order_F: Tensor
    """Neuron numbers, the most important first, int32."""
    scale_F: Tensor
    """Scale of each neuron, float32. A neuron's score is abs(gate) * scale."""
    repair_FD: Tensor | None
    """The down projection refitted for reduced levels, bfloat16. Row n belongs to neuron n. None where the model's own serves."""


def activate(gate: Tensor, activation: str) -> Tensor:
    """Apply one of ACTIVATIONS elementwise."""
    if activation == "silu":
        return functional.silu(gate)
    return functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def get_mask(gate_TF: Tensor, level: Level, layer: int, neurons: Neurons, activation: str, score: Score) -> Tensor:
    """Return bool (T, F): the neurons that a level computes in `layer`, given the gate projection's output (T, F)."""
    parameter = level.parameters_L[layer].item()
    if level.reduction == "width":
        mask_F = torch.zeros(gate_TF.shape[-1], dtype=torch.bool)
        mask_F[neurons.order_F[: int(parameter)].long()] = True
        return mask_F.expand_as(gate_TF)
    source_TF = gate_TF if score == "gate" else activate(gate_TF, activation)
    return source_TF.float().abs() * neurons.scale_F >= parameter


def reduce_mlp(
    x_TD: Tensor,
    gate_FD: Tensor,
    up_FD: Tensor,
    down_DF: Tensor,
    *,
    level: Level,
    layer: int,
    neurons: Neurons,
    activation: str = "silu",
    score: Score = "gate",
) -> tuple[Tensor, Tensor]:
    """Return the MLP's output (T, D) at a level, and per token the share of the MLP's FLOPs that computing it takes (T,).

    The weights are the model's own (nn.Linear layout). Ordered levels compute their neurons alone; contextual ones the whole
    gate, then up and down of the neurons that pass. A layer that a level leaves whole is the plain MLP, without repair.
    """
    gate_TF = functional.linear(x_TD, gate_FD)
    mask_TF = get_mask(gate_TF, level, layer, neurons, activation, score)
    h_TF = activate(gate_TF, activation) * functional.linear(x_TD, up_FD)
    parameter, size = level.parameters_L[layer].item(), gate_FD.shape[0]
    if parameter == (size if level.reduction == "width" else 0):
        return functional.linear(h_TF, down_DF), torch.ones(x_TD.shape[0])
    down_FD = down_DF.T if neurons.repair_FD is None else neurons.repair_FD.to(x_TD.dtype)
    active_T = mask_TF.float().mean(-1)
    computed_T = active_T if level.reduction == "width" else (1 + 2 * active_T) / 3
    if parameter == (0 if level.reduction == "width" else float("inf")):
        computed_T = torch.zeros_like(computed_T)
    return (h_TF * mask_TF) @ down_FD, computed_T
