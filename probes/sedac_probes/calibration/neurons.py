"""Statistics of every neuron: how much it does, which orders them and scales their scores. Called by `calibrate`.

F neurons, D hidden size, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sedac.errors import ConfigError
from sedac.probe.levels import Neurons
from torch import Tensor
from tqdm import tqdm

from sedac_probes.calibration.reduced import Batch, Plain, ReducedModel


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Sums over the tokens of a text, per layer and neuron."""

    up: Mapping[int, Tensor]
    """Sum of abs(up), (F,)."""
    hidden: Mapping[int, Tensor]
    """Sum of abs(act(gate) * up), (F,)."""
    num_tokens: int


class _Summing(Plain):
    """Sums over neurons, layer by layer."""

    def __init__(self, model: ReducedModel) -> None:
        size = model.intermediate_size
        self.num_tokens = 0
        self.up_F, self.h_F = ([torch.zeros(size, dtype=torch.float64) for _ in model.mlps] for _ in range(2))

    def begin(self, batch: Batch) -> None:
        """Note which tokens are no padding; only those are summed."""
        self.real_T = batch.real_BS.flatten()
        self.num_tokens += int(self.real_T.sum())

    def compute(self, layer: int, x_TD: Tensor, mlp: Any) -> tuple[Tensor, Tensor]:
        """Compute in full, and add what each neuron did."""
        up_TF = mlp.up_proj(x_TD)
        h_TF = mlp.act_fn(mlp.gate_proj(x_TD)) * up_TF
        self.up_F[layer] += up_TF[self.real_T].abs().sum(0)
        self.h_F[layer] += h_TF[self.real_T].abs().sum(0)
        return mlp.down_proj(h_TF), torch.ones(x_TD.shape[0])


@torch.inference_mode()
def describe_neurons(model: ReducedModel, batches: Sequence[Batch], statistics: Statistics | None = None) -> dict[int, Neurons]:
    """Return each layer's order (by E abs(h) * norm(down column)) and scale (E abs(up) * norm(down column)).

    `statistics` recorded elsewhere, such as by the engine that will serve, are taken as they are; else they are made from `batches`.

    Raises:
        ConfigError: the statistics are of another model.
    """
    if statistics is None:
        summing = _Summing(model)
        for batch in tqdm(batches, desc="statistics", unit="batch"):
            model.run(batch, summing)
        statistics = Statistics(up=dict(enumerate(summing.up_F)), hidden=dict(enumerate(summing.h_F)), num_tokens=summing.num_tokens)
    found = (len(statistics.up), {len(t) for t in statistics.up.values()})
    if found != (model.num_layers, {model.intermediate_size}):
        raise ConfigError(
            f"the collection's statistics are of {found[0]} layers of {sorted(found[1])} neurons, the model has {model.num_layers} of "
            f"{model.intermediate_size}; collect from this model"
        )
    neurons = {}
    for layer, mlp in enumerate(model.mlps):
        norm_F = mlp.down_proj.weight.norm(dim=0)
        scale_F = (statistics.up[layer].double() / statistics.num_tokens).float() * norm_F
        order_F = (statistics.hidden[layer].float() * norm_F).argsort(descending=True).to(torch.int32)
        neurons[layer] = Neurons(order_F=order_F, scale_F=scale_F, repair_FD=None)
    return neurons
