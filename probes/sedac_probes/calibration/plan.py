"""The plan: how much each layer gives up at a level, from the damage of reducing one layer alone. Called by `calibrate`.

L layers, P points of a curve, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from sedac.probe.levels import Level, Neurons, Reduction, Score
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from sedac_probes.calibration.forms import AtLevel
from sedac_probes.calibration.reduced import Batch, Form, Plain, ReducedModel
from sedac_probes.calibration.reductions import MOST_SAVED, make_level

_DROPPED = (0.25, 0.5, 0.75, 0.92)  # shares of a layer's neurons, the points of its damage curve; no plan goes beyond the last
_PIECES = 16  # of a curve between two points


class _Watching(Plain):
    """Keeps the stream before every layer."""

    def __init__(self) -> None:
        self.streams: list[Tensor] = []

    def watch(self, layer: int, stream_TD: Tensor) -> None:
        self.streams.append(stream_TD)


@torch.inference_mode()
def measure_damage(model: ReducedModel, batches: Sequence[Batch], forms: Sequence[Sequence[Form]], description: str) -> Tensor:
    """Return the mean KL (L, P) from the full model, in nats, of each layer's forms, each alone."""
    sums = torch.zeros(len(forms), len(forms[0]), dtype=torch.float64)
    with tqdm(total=len(batches) * sums.numel(), desc=description, unit="pass") as bar:
        for batch in batches:
            watching = _Watching()
            full_NV = model.run(batch, watching)[0][batch.real_BS].log_softmax(-1)
            for layer, points in enumerate(forms):
                stream = watching.streams[layer - 1].view(*batch.ids_BS.shape, -1) if layer else None
                for point, form in enumerate(points):
                    form_NV = model.run(batch, form, layer, stream)[0][batch.real_BS].log_softmax(-1)
                    sums[layer, point] += functional.kl_div(form_NV, full_NV, log_target=True, reduction="sum").double()
                    bar.update()
    return sums / sum(int(batch.real_BS.sum()) for batch in batches)


def measure_curves(
    model: ReducedModel,
    batches: Sequence[Batch],
    reduction: Reduction,
    neurons: Mapping[int, Neurons],
    score: Score,
    points: Sequence[float] = _DROPPED,
) -> list[list[tuple[float, float]]]:
    """Return each layer's damage curve: (share of its FLOPs saved, KL), one point per dropped share, each layer reduced alone."""
    most, full = MOST_SAVED[reduction], (float(model.intermediate_size) if reduction == "width" else 0.0)
    made = [make_level(model, batches, "point", reduction, [most * d] * model.num_layers, neurons, score).parameters_L for d in points]

    def alone(layer: int, parameters_L: Tensor) -> Form:
        """Return the form that reduces one layer alone."""
        only_L = torch.full_like(parameters_L, full)
        only_L[layer] = parameters_L[layer]
        return AtLevel(Level(name="point", reduction=reduction, parameters_L=only_L), neurons, model.activation, score)

    forms = [[alone(layer, parameters_L) for parameters_L in made] for layer in range(model.num_layers)]
    damage_LP = measure_damage(model, batches, forms, f"damage of {reduction} ({score})" if reduction == "contextual" else f"damage of {reduction}")
    return [[(most * d, kl) for d, kl in zip(points, row, strict=True)] for row in damage_LP.tolist()]


def _refine(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return more points between a curve's own, and down to 0, as if damage were a power of the saving between each two."""
    points = sorted((x, max(y, 1e-9)) for x, y in curve)
    refined: list[tuple[float, float]] = []
    for (x0, y0), (x1, y1) in pairwise(points):
        power = math.log(y1 / y0) / math.log(x1 / x0)
        low = x0 if refined else 0.0
        steps = [low + (x1 - low) * i / _PIECES for i in range(1, _PIECES + 1)]
        refined += [(x, y0 * (x / x0) ** power) for x in steps]
    return refined or points


def plan_savings(curves: Sequence[Sequence[tuple[float, float]]], saved: float) -> list[float]:
    """Return each layer's share of saved FLOPs, `saved` on average: the cheapest damage per FLOP first.

    Each curve, refined, is replaced by its lower convex hull from (0, 0); the hulls' segments are taken by slope until enough is saved.
    """
    segments = []
    for layer, curve in enumerate(curves):
        hull = [(0.0, 0.0)]
        for x, y in _refine(curve):
            while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-1][0]) >= (y - hull[-1][1]) * (hull[-1][0] - hull[-2][0]):
                hull.pop()
            hull.append((x, y))
        segments += [((y1 - y0) / (x1 - x0), layer, x1 - x0) for (x0, y0), (x1, y1) in pairwise(hull)]
    given, left = [0.0] * len(curves), saved * len(curves)
    for _slope, layer, length in sorted(segments):
        taken = min(length, left)
        given[layer] += taken
        left -= taken
    return given
