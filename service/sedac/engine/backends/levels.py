"""The level table: what each named level means for each layer, in buffers that operators read and policies never touch.

`full` and `skip` are built in; the rest comes from the probe set.
L layers, V levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sedac.engine.backends.kinds import KIND_FULL, KIND_SKIP, KINDS, find_number
from sedac.policy.model import FULL, MAX_LEVELS, SKIP
from sedac.probe.levels import Level

NO_LEVEL = 255


class LevelTable:
    """Levels by index: their names, what they save, and kind and parameter per layer."""

    def __init__(self, num_layers: int, levels: Sequence[Level], shares: Sequence[float], intermediate_size: int, device: torch.device) -> None:
        self.names = (FULL, SKIP, *(level.name for level in levels))
        self.kind_names = {FULL: FULL, SKIP: SKIP, **{level.name: level.reduction for level in levels}}
        """Names of the kinds, by level."""
        self.kind_LV = torch.zeros(num_layers, MAX_LEVELS, dtype=torch.uint8)
        self.parameter_LV = torch.zeros(num_layers, MAX_LEVELS, dtype=torch.float32)  # dtype given: models are built under their own default
        self.share_V = torch.zeros(MAX_LEVELS, dtype=torch.float32)
        self.ladder_VV = torch.full((MAX_LEVELS, MAX_LEVELS), NO_LEVEL, dtype=torch.uint8)
        self.kind_LV[:, 1], self.share_V[1] = KIND_SKIP, 1.0
        for i, (level, share) in enumerate(zip(levels, shares, strict=True), start=2):
            self.share_V[i] = share
            own = find_number(level.reduction)
            for layer, parameter in enumerate(level.parameters_L.tolist()):
                end = KINDS[own].find_end(parameter, intermediate_size)
                self.kind_LV[layer, i], self.parameter_LV[layer, i] = find_number(end) if end else own, parameter
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

    def make_row(self, layer: int, counts: Mapping[int, int], *, has_neurons: bool) -> tuple[Tensor, Tensor]:
        """Return kind (uint8) and parameter (fp32) of each level (V,) as one rank computes one layer's MLP.

        `counts`: how many of the leading k neurons are this rank's own, by k; empty: all. Without neuron-major weights what needs
        them is computed in full.
        """
        kind_V, parameter_V = self.kind_LV[layer].clone(), self.parameter_LV[layer].clone()
        for i, number in enumerate(kind_V.tolist()):
            kind = KINDS[number]
            if kind.needs_neurons and not has_neurons:
                kind_V[i] = KIND_FULL
            elif counts:
                parameter_V[i] = kind.localize(float(parameter_V[i]), counts)
        return kind_V, parameter_V
