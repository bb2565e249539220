"""Repair: every layer's down projection refitted on what reduced levels leave of its activations. Called by `calibrate`.

F neurons, D hidden size, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from sedac.probe.levels import Level, Neurons, Score, get_mask
from torch import Tensor
from tqdm import tqdm

from sedac_probes.calibration.reduced import Batch, Plain, ReducedModel

_RIDGE = 0.3


class _Recording(Plain):
    """Keeps what a layer's ridge fit needs: gates, activations and the plain output."""

    def compute(self, layer: int, x_TD: Tensor, mlp: Any) -> tuple[Tensor, Tensor]:
        """Compute in full, and keep what went through."""
        self.gate_TF = mlp.gate_proj(x_TD)
        self.h_TF = mlp.act_fn(self.gate_TF) * mlp.up_proj(x_TD)
        self.y_TD = mlp.down_proj(self.h_TF)
        return self.y_TD, torch.ones(x_TD.shape[0])


@torch.inference_mode()
def fit_repair(
    model: ReducedModel, batches: Sequence[Batch], levels: Sequence[Level], neurons: Mapping[int, Neurons], score: Score, *, ridge: float = _RIDGE
) -> dict[int, Neurons]:
    """Refit every layer's down projection on the activations that `levels` leave (several count alike), towards the full output.

    Ridge towards the model's own weights, in units of the mean square activation. Inputs are the full model's: fitted on inputs
    that the layers before have reduced, the repair suits its own level better and every milder one worse.
    """
    repaired, recording = dict(neurons), _Recording()
    streams: list[Tensor | None] = [None] * len(batches)
    for layer in tqdm(range(model.num_layers), desc="repair", unit="layer"):
        down_FD = model.mlps[layer].down_proj.weight.T.contiguous()
        gram_FF, cross_FD = torch.zeros(len(down_FD), len(down_FD)), torch.zeros_like(down_FD)
        for i, batch in enumerate(batches):
            streams[i] = model.advance(batch, recording, layer, streams[i])
            real_T = batch.real_BS.flatten()
            for level in levels:
                mask_TF = get_mask(recording.gate_TF, level, layer, neurons[layer], model.activation, score)
                h_TF = (recording.h_TF * mask_TF)[real_T]
                gram_FF += h_TF.T @ h_TF
                cross_FD += h_TF.T @ (recording.y_TD[real_T] - h_TF @ down_FD)
        damping_FF = torch.eye(len(down_FD)) * (ridge * gram_FF.diagonal().mean())
        repaired[layer] = replace(neurons[layer], repair_FD=(down_FD + torch.linalg.solve(gram_FF + damping_FF, cross_FD)).to(torch.bfloat16))
    return repaired
