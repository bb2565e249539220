"""Calibrate: make the reduced levels of a probe set from a model and calibration text.

In order: statistics of every neuron; damage of reducing one layer alone, from which a plan says how much each layer gives up
at each level; the down projections refitted on reduced activations (repair); thresholds; quality on other text; tiers.
L layers, F neurons, D hidden size, T tokens, P points of a curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from sedac.errors import ConfigError
from sedac.probe import artifact
from sedac.probe.cascade import Knobs
from sedac.probe.levels import Level, Neurons, Reduction, Score, activate, get_mask
from sedac.probe.manifest import LevelRecord, Manifest, TierRecord
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from sedac_probes.forms import AtLevel, Decided
from sedac_probes.reduced import Batch, Form, Plain, Quality, ReducedModel

SAVINGS = {"contextual": (0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5), "width": (0.1, 0.2, 0.3, 0.4, 0.5)}
BOUNDS = {"conservative": 1.003, "balanced": 1.01, "aggressive": 1.03}
REDUCTIONS: tuple[Reduction, ...] = ("contextual", "width")
SCORES: tuple[Score, ...] = ("gate", "activation")
_DROPPED = (0.25, 0.5, 0.75, 0.92)  # shares of a layer's neurons, the points of its damage curve; no plan goes beyond the last
_MOST_SAVED = {"contextual": 2 / 3, "width": 1.0}  # of an MLP's FLOPs when no neuron is left; contextual has computed the gate
_SAMPLED = 2048  # tokens per batch and layer whose scores are sorted
_PIECES = 16  # of a curve between two points
_FEW = 2  # batches for damage curves and thresholds
_REPAIR_SAVINGS = (0.1, 0.2, 0.3, 0.4)
_RIDGE = 0.3


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What calibration found, ready to be written into a probe set."""

    levels: tuple[Level, ...]
    neurons: dict[int, Neurons]
    score: Score
    qualities: tuple[Quality, ...]
    """of the levels, on text that served nothing else"""
    damage: Mapping[Reduction, list[list[tuple[float, float]]]]
    """per reduction and layer: (share of the layer's FLOPs saved, KL in nats)"""
    tiers: tuple[TierRecord, ...]
    tier_qualities: dict[str, Quality]


class _Statistics(Plain):
    """Sums over neurons, layer by layer, and some tokens' activations."""

    def __init__(self, model: ReducedModel) -> None:
        size = model.intermediate_size
        self.num_tokens = 0
        self.up_F, self.h_F = ([torch.zeros(size, dtype=torch.float64) for _ in model.mlps] for _ in range(2))

    def begin(self, batch: Batch) -> None:
        self.real_T = batch.real_BS.flatten()
        self.num_tokens += int(self.real_T.sum())

    def compute(self, layer: int, x_TD: Tensor, mlp: Any) -> tuple[Tensor, Tensor]:
        up_TF = mlp.up_proj(x_TD)
        h_TF = mlp.act_fn(mlp.gate_proj(x_TD)) * up_TF
        self.up_F[layer] += up_TF[self.real_T].abs().sum(0)
        self.h_F[layer] += h_TF[self.real_T].abs().sum(0)
        return mlp.down_proj(h_TF), torch.ones(x_TD.shape[0])


@torch.inference_mode()
def describe_neurons(model: ReducedModel, batches: Sequence[Batch]) -> dict[int, Neurons]:
    """Return each layer's order (by E abs(h) * norm(down column)) and scale (E abs(up) * norm(down column))."""
    statistics = _Statistics(model)
    for batch in tqdm(batches, desc="statistics", unit="batch"):
        model.run(batch, statistics)
    neurons = {}
    for layer, mlp in enumerate(model.mlps):
        norm_F = mlp.down_proj.weight.norm(dim=0)
        scale_F = (statistics.up_F[layer] / statistics.num_tokens).float() * norm_F
        order_F = (statistics.h_F[layer].float() * norm_F).argsort(descending=True).to(torch.int32)
        neurons[layer] = Neurons(order_F=order_F, scale_F=scale_F, repair_FD=None)
    return neurons


class _Setting(AtLevel):
    """Sets each layer's threshold so that a share of the scores passes, on inputs that the layers before have reduced already."""

    def __init__(self, level: Level, dropped_L: Sequence[float], neurons: Mapping[int, Neurons], activation: str, score: Score) -> None:
        super().__init__(level, neurons, activation, score)
        self.dropped_L, self.thresholds = dropped_L, [[0.0] for _ in dropped_L]

    def begin(self, batch: Batch) -> None:
        self.rows = batch.real_BS.flatten().nonzero().squeeze(1)

    def compute(self, layer: int, x_TD: Tensor, mlp: Any) -> tuple[Tensor, Tensor]:
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
    dropped_L = [saved / _MOST_SAVED[reduction] for saved in saved_L]
    if reduction == "width":
        step = 16 if model.intermediate_size >= 512 else 1
        counts = [min(model.intermediate_size, step * round(model.intermediate_size * (1 - d) / step)) for d in dropped_L]
        return Level(name=name, reduction=reduction, parameters_L=torch.tensor(counts, dtype=torch.int32))
    setting = _Setting(Level(name=name, reduction=reduction, parameters_L=torch.zeros(model.num_layers)), dropped_L, neurons, model.activation, score)
    for batch in batches:
        model.run(batch, setting)
    means = [sum(found[1:]) / len(batches) if d > 0 else 0.0 for found, d in zip(setting.thresholds, dropped_L, strict=True)]
    return Level(name=name, reduction=reduction, parameters_L=torch.tensor(means))


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
    most, full = _MOST_SAVED[reduction], (float(model.intermediate_size) if reduction == "width" else 0.0)
    made = [make_level(model, batches, "point", reduction, [most * d] * model.num_layers, neurons, score).parameters_L for d in points]

    def alone(layer: int, parameters_L: Tensor) -> Form:
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


class _Recording(Plain):
    """Keeps what a layer's ridge fit needs: gates, activations and the plain output."""

    def compute(self, layer: int, x_TD: Tensor, mlp: Any) -> tuple[Tensor, Tensor]:
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


def propose_tiers(
    levels: Sequence[Level], qualities: Sequence[Quality], measure_tier: Callable[[Level, Level], Quality]
) -> tuple[tuple[TierRecord, ...], dict[str, Quality]]:
    """Return a tier per bound, and what it was measured to be where it reduces anything.

    Floor: the most saving level within the bound. Level of confident tokens: the floor's next in its own kind, where
    `measure_tier` finds that within the bound too; else the floor.
    """
    tiers, found = [], {}
    for name, bound in BOUNDS.items():
        within = [i for i, q in enumerate(qualities) if q.perplexity_ratio <= bound]
        if not within:
            tiers.append(TierRecord(name=name, floor="full", level="full"))
            continue
        best = max(within, key=lambda i: qualities[i].saved)
        floor = level = levels[best]
        found[name] = qualities[best]
        more = [i for i, q in enumerate(qualities) if levels[i].reduction == floor.reduction and q.saved > qualities[best].saved]
        if more:
            above = levels[min(more, key=lambda i: qualities[i].saved)]
            quality = measure_tier(floor, above)
            if quality.perplexity_ratio <= bound:
                level, found[name] = above, quality
        tiers.append(TierRecord(name=name, floor=floor.name, level=level.name))
    return tuple(tiers), found


def calibrate(model: ReducedModel, probe_set: artifact.ProbeSet, texts: Sequence[str], *, max_length: int = 512) -> Calibration:
    """Make levels and tiers from `texts`: a fourth of them measures what the others made.

    Raises:
        ConfigError: the probe set is of another model, or the texts are too few.
    """
    manifest = probe_set.manifest
    if (manifest.num_layers, manifest.hidden_size) != (model.num_layers, model.hidden_size):
        shape = f"{model.num_layers} layers of hidden size {model.hidden_size}"
        raise ConfigError(
            f"probe set {manifest.name} is for {manifest.num_layers} layers of hidden size {manifest.hidden_size}, the model has {shape}"
        )
    if len(texts) < 4:
        raise ConfigError(f"{len(texts)} texts to calibrate with; name at least 4")
    batches = model.make_batches([t for i, t in enumerate(texts) if i % 4 != 3], max_length=max_length)
    check = model.make_batches(texts[3::4], max_length=max_length)
    few = batches[len(batches) // 2 :: max(1, len(batches) // 6)][:_FEW]  # not the shortest
    neurons = describe_neurons(model, batches)
    # The score: whichever costs less where half of each layer's neurons stay.
    half = {score: sum(curve[0][1] for curve in measure_curves(model, few, "contextual", neurons, score, points=(0.5,))) for score in SCORES}
    score = min(SCORES, key=lambda s: half[s])
    curves = {reduction: measure_curves(model, few, reduction, neurons, score) for reduction in REDUCTIONS}

    def make(reduction: Reduction, saved: float) -> Level:
        return make_level(model, few, f"{reduction}-{saved * 100:.0f}", reduction, plan_savings(curves[reduction], saved), neurons, score)

    def at(level: Level) -> AtLevel:
        return AtLevel(level, neurons, model.activation, score)

    def measure_tier(floor: Level, level: Level) -> Quality:
        knobs = {p.layer: Knobs(threshold=p.threshold) for p in manifest.probes}
        return model.measure(check, [Decided(probe_set.probes, knobs, floor=at(floor), level=at(level))], f"tier {floor.name}, {level.name}")[0]

    neurons = fit_repair(model, batches, [make("contextual", saved) for saved in _REPAIR_SAVINGS], neurons, score)
    levels = [make(reduction, saved) for reduction in REDUCTIONS for saved in SAVINGS[reduction]]
    measured = sorted(zip(model.measure(check, [at(level) for level in levels]), levels, strict=True), key=lambda pair: pair[0].saved)
    qualities, levels = [q for q, _ in measured], [level for _, level in measured]
    tiers, tier_qualities = propose_tiers(levels, qualities, measure_tier)
    return Calibration(
        levels=tuple(levels), neurons=neurons, score=score, qualities=tuple(qualities), damage=curves, tiers=tiers, tier_qualities=tier_qualities
    )


def write(out: Path, model: ReducedModel, probe_set: artifact.ProbeSet, made: Calibration, training: dict[str, Any]) -> Manifest:
    """Write the probe set with the levels; its probes and their thresholds stay."""
    records = [
        LevelRecord(
            name=level.name,
            reduction=level.reduction,
            saved=q.saved,
            perplexity_ratio=q.perplexity_ratio,
            metrics={"agreement": q.agreement, "kl": q.kl, "num_tokens": q.num_tokens},
        )
        for level, q in zip(made.levels, made.qualities, strict=True)
    ]
    manifest = replace(
        probe_set.manifest,
        intermediate_size=model.intermediate_size,
        activation=model.activation,
        score=made.score,
        levels=tuple(records),
        tiers=made.tiers,
        training=probe_set.manifest.training | {"calibration": training},
    )
    return artifact.save(out, manifest, probe_set.probes, levels=made.levels, neurons=made.neurons)
