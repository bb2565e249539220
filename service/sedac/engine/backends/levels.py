"""The level table: what each named level means for each layer, in buffers that operators read and policies never touch.

`full` and `skip` are built in; the rest comes from the probe set. Also the neuron-major weights of one MLP and the plain torch
form of the reductions, which runs where the native kernels do not.
L layers, F neurons of an MLP (of this rank's share), D hidden size, N rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sedac.policy.model import FULL, MAX_LEVELS, SKIP
from sedac.probe.levels import Level, Neurons, activate

KIND_FULL, KIND_SKIP, KIND_WIDTH, KIND_CONTEXTUAL = range(4)
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
NO_LEVEL = 255


class LevelTable:
    """Levels by index: their names, what they save, and kind and parameter per layer."""

    def __init__(self, num_layers: int, levels: Sequence[Level], shares: Sequence[float], intermediate_size: int, device: torch.device) -> None:
        self.names = (FULL, SKIP, *(level.name for level in levels))
        self.kind_LV = torch.zeros(num_layers, MAX_LEVELS, dtype=torch.uint8)
        self.parameter_LV = torch.zeros(num_layers, MAX_LEVELS, dtype=torch.float32)  # dtype given: models are built under their own default
        self.share_V = torch.zeros(MAX_LEVELS, dtype=torch.float32)
        self.ladder_VV = torch.full((MAX_LEVELS, MAX_LEVELS), NO_LEVEL, dtype=torch.uint8)
        self.kind_LV[:, 1], self.share_V[1] = KIND_SKIP, 1.0
        for i, (level, share) in enumerate(zip(levels, shares, strict=True), start=2):
            self.share_V[i] = share
            for layer, parameter in enumerate(level.parameters_L.tolist()):
                if level.reduction == "width":
                    kind = KIND_FULL if parameter >= intermediate_size else KIND_SKIP if parameter == 0 else KIND_WIDTH
                else:
                    kind = KIND_FULL if parameter <= 0 else KIND_SKIP if math.isinf(parameter) else KIND_CONTEXTUAL
                self.kind_LV[layer, i], self.parameter_LV[layer, i] = kind, parameter
        reductions = {i: level.reduction for i, level in enumerate(levels, start=2)}
        for goal in range(1, len(self.names)):
            wanted = reductions.get(goal, "contextual")
            steps = [i for i, r in reductions.items() if r == wanted and self.share_V[i] < self.share_V[goal]] + [goal]
            steps.sort(key=lambda i: float(self.share_V[i]))
            self.ladder_VV[goal, : len(steps)] = torch.tensor(steps, dtype=torch.uint8)
        self.kind_LV, self.parameter_LV = self.kind_LV.to(device), self.parameter_LV.to(device)
        self.share_V, self.ladder_VV = self.share_V.to(device), self.ladder_VV.to(device)

    def get_index(self, name: str) -> int:
        """Return the index of a level that the layout lists."""
        return self.names.index(name)


@dataclass(kw_only=True)
class NeuronWeights:
    """One MLP's weights with a row per neuron, in order of importance: the copy that reduced levels read."""

    gate_FD: Tensor
    up_FD: Tensor
    down_FD: Tensor
    """row n is the neuron's column of the down projection, repaired where the probe set says so"""
    scale_F: Tensor
    """fp32, in order of importance: score = abs(gate) * scale"""
    order_F: Tensor
    """int64: the model's own neuron (of this rank) of each row"""
    repaired: bool
    activation: str
    scores_activation: bool
    counts: dict[int, int]
    """leading neurons of this rank by leading neurons of the whole MLP, for widths under tensor parallelism"""

    def compute(self, x_ND: Tensor, kind: int, parameter: float) -> tuple[Tensor, Tensor]:
        """Return (N, D) at one kind and parameter, and the share of the MLP's work (N,) that was computed."""
        num_neurons = self.gate_FD.shape[0]
        width = min(self.counts.get(int(parameter), int(parameter)), num_neurons) if kind == KIND_WIDTH else num_neurons
        gate_NF = functional.linear(x_ND, self.gate_FD[:width])
        active_NF = activate(gate_NF, self.activation)
        h_NF = active_NF * functional.linear(x_ND, self.up_FD[:width])
        if kind == KIND_WIDTH:
            return h_NF @ self.down_FD[:width], torch.full((x_ND.shape[0],), width / num_neurons, device=x_ND.device)
        score_NF = (active_NF if self.scores_activation else gate_NF).float().abs() * self.scale_F
        keep_NF = score_NF >= parameter
        return (h_NF * keep_NF) @ self.down_FD, (1 + 2 * keep_NF.float().mean(-1)) / 3


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
