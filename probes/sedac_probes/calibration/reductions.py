"""A reduced level from the share of FLOPs that each layer gives up: counts of neurons, or thresholds on their scores.

Called by `calibrate`, `plan` and `compare`. F neurons, D hidden size, T tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sedac.probe.levels import Level, Neurons, Reduction, Score, activate
from torch import Tensor

from sedac_probes.calibration.forms import AtLevel
from sedac_probes.calibration.reduced import Batch, ReducedModel

MOST_SAVED = {"contextual": 2 / 3, "width": 1.0}
"""Share of an MLP's FLOPs saved when no neuron is left. A contextual level has computed the gate."""
_SAMPLED = 2048  # tokens per batch and layer whose scores are sorted


class _Setting(AtLevel):
    """Sets each layer's threshold so that a share of the scores passes, on inputs that the layers before have reduced already."""

    def __init__(self, level: Level, dropped_L: Sequence[float], neurons: Mapping[int, Neurons], activation: str, score: Score) -> None:
        super().__init__(level, neurons, activation, score)
        self.dropped_L, self.thresholds = dropped_L, [[0.0] for _ in dropped_L]

    def begin(self, batch: Batch) -> None:
        """Note which tokens are no padding; only their scores count."""
        self.rows = batch.real_BS.flatten().nonzero().squeeze(1)

    def compute(self, layer: int, x_TD: Tensor, mlp: Any) -> tuple[Tensor, Tensor]:
        """Set the layer's threshold by this batch, then compute at it."""
        rows = self.rows[:: max(1, len(self.rows) // _SAMPLED)]
        gate_TF = mlp.gate_proj(x_TD[rows])
        source_TF = gate_TF if self.score == "gate" else activate(gate_TF, self.activation)
        scores = (source_TF.abs() * self.neurons[layer].scale_F).flatten()
        dropped = round(self.dropped_L[layer] * len(scores))
        threshold = scores.kthvalue(dropped).values.item() if dropped else 0.0
        self.thresholds[layer].append(threshold)
        self.level.parameters_L[layer] = threshold
        return super().compute(layer, x_TD, mlp)


@torch.inference_mode()
def make_level(
    model: ReducedModel,
    batches: Sequence[Batch],
    name: str,
    reduction: Reduction,
    saved_L: Sequence[float],
    neurons: Mapping[int, Neurons],
    score: Score,
) -> Level:
    """Return the level at which each layer saves its share of `saved_L`: counts, or thresholds set on `batches`."""
    dropped_L = [saved / MOST_SAVED[reduction] for saved in saved_L]
    if reduction == "width":
        step = 16 if model.intermediate_size >= 512 else 1
        counts = [min(model.intermediate_size, step * round(model.intermediate_size * (1 - d) / step)) for d in dropped_L]
        return Level(name=name, reduction=reduction, parameters_L=torch.tensor(counts, dtype=torch.int32))
    setting = _Setting(Level(name=name, reduction=reduction, parameters_L=torch.zeros(model.num_layers)), dropped_L, neurons, model.activation, score)
    for batch in batches:
        model.run(batch, setting)
    means = [sum(found[1:]) / len(batches) if d > 0 else 0.0 for found, d in zip(setting.thresholds, dropped_L, strict=True)]
    return Level(name=name, reduction=reduction, parameters_L=torch.tensor(means))
