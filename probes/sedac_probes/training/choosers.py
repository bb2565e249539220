"""Choosers: who says which tokens get less, at equal saving: probes, chance, and the measured damage itself, which no probe can beat.

Every chooser names the same share of the tokens of held-out text at one checkpoint; those get the level above it, the others the floor.
Called by the command `validate --against`. T tokens (B sequences of S).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sedac.probe.probe import LREProbe
from torch import Tensor
from tqdm import tqdm

from sedac_probes.calibration.reduced import Batch, Form, Plain, ReducedModel
from sedac_probes.training.damage import Watched, measure_damage

RANDOM, ORACLE = "random tokens", "oracle: measured damage"


class Chosen(Plain):
    """A level for chosen tokens in every layer that is run, the floor for the others."""

    def __init__(self, chosen_T: Tensor, floor: Form, level: Form) -> None:
        self.chosen_T, self.floor, self.level = chosen_T, floor, level

    def compute(self, layer: int, x_TD: Tensor, mlp: Any) -> tuple[Tensor, Tensor]:
        """Compute each token at what it was given."""
        y_TD, computed_T = (part.clone() for part in self.floor.compute(layer, x_TD, mlp))
        y_TD[self.chosen_T], computed_T[self.chosen_T] = self.level.compute(layer, x_TD[self.chosen_T], mlp)
        return y_TD, computed_T


@torch.inference_mode()
def compare_choosers(
    model: ReducedModel, batches: Sequence[Batch], probes: Mapping[str, Mapping[int, LREProbe]], layer: int, shares: Sequence[float],
    floor: Form, level: Form,
) -> dict[str, list[float]]:  # fmt: skip
    """Return per chooser the perplexity ratio to the full model when it names each of `shares` of the tokens at the checkpoint `layer`.

    The share is exact over all batches, for every chooser: the threshold is the quantile of its own values.
    """
    damage = [measure_damage(model, batch, (layer,), level, floor)[layer] for batch in batches]
    streams, full = [], []
    for batch in batches:
        watched = Watched(floor, (layer,))
        model.run(batch, watched)
        streams.append(watched.streams[layer])
        full.append(_score(model, batch, Plain()))
    dice = torch.Generator().manual_seed(0)
    values = {name: [known[layer](s.flatten(0, 1)).view(s.shape[:2]) for s in streams] for name, known in probes.items()}
    values |= {RANDOM: [torch.rand(s.shape[:2], generator=dice) for s in streams], ORACLE: damage}
    result: dict[str, list[float]] = {}
    bar = tqdm(total=len(values) * len(shares) * len(batches), desc=f"choosers at layer {layer}", unit="pass")
    for name, risks in values.items():
        real_N = torch.cat([risk[batch.real_BS] for risk, batch in zip(risks, batches, strict=True)]).sort().values
        for share in shares:
            limit, lost, count = real_N[round(share * len(real_N))], 0.0, 0
            for batch, stream, risk, plain in zip(batches, streams, risks, full, strict=True):
                scored_N = _score(model, batch, Chosen((risk < limit).flatten(), floor, level), layer + 1, stream)
                lost, count = lost + float((plain - scored_N).double().sum()), count + len(scored_N)
                bar.update()
            result.setdefault(name, []).append(math.exp(lost / count))
    bar.close()
    return result


def _score(model: ReducedModel, batch: Batch, form: Form, start: int = 0, stream_BSD: Tensor | None = None) -> Tensor:
    """Return the log-probability of every token that has one before it (N,), nats."""
    logits_BSV = model.run(batch, form, start, stream_BSD)[0]
    scored_BS = batch.real_BS[:, 1:]
    found: Tensor = logits_BSV[:, :-1][scored_BS].log_softmax(-1).gather(1, batch.ids_BS[:, 1:][scored_BS][:, None]).squeeze(1)
    return found
