"""Calibrate: make the reduced levels and tiers of a probe set from a model and calibration text.

In order: statistics of every neuron; damage of reducing one layer alone, from which a plan says how much each layer gives up
at each level; the down projections refitted on reduced activations (repair); thresholds; quality on other text; tiers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sedac.errors import ConfigError
from sedac.policy.model import FULL
from sedac.probe import artifact
from sedac.probe.cascade import Knobs
from sedac.probe.levels import Level, Neurons, Reduction, Score
from sedac.probe.manifest import LevelRecord, Manifest, TierRecord
from tqdm import tqdm

from sedac_probes.calibration.forms import AtLevel, Decided
from sedac_probes.calibration.neurons import Statistics, describe_neurons
from sedac_probes.calibration.plan import measure_curves, plan_savings
from sedac_probes.calibration.reduced import Plain, Quality, ReducedModel
from sedac_probes.calibration.reductions import make_level
from sedac_probes.calibration.repair import fit_repair
from sedac_probes.calibration.tiers import Target, find_scales, find_tier, get_risks, set_thresholds

SAVINGS = {"contextual": (0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5), "width": (0.1, 0.2, 0.3, 0.4, 0.5)}
TARGETS = {"conservative": Target(max_ratio=1.003), "balanced": Target(max_ratio=1.01), "aggressive": Target(max_ratio=1.03)}
"""Targets of the tiers that every set gets."""
REDUCTIONS: tuple[Reduction, ...] = ("contextual", "width")
SCORES: tuple[Score, ...] = ("gate", "activation")
_EXITS = (0.02, 0.05, 0.1, 0.2)  # shares of tokens that exit at each checkpoint, for hard exits beside the levels
_FEW = 2  # batches for damage curves and thresholds
_REPAIR_SAVINGS = (0.1, 0.2, 0.3, 0.4)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What calibration found, ready to be written into a probe set."""

    levels: tuple[Level, ...]
    neurons: dict[int, Neurons]
    score: Score
    qualities: tuple[Quality, ...]
    """Quality of each level, on text that served nothing else."""
    damage: Mapping[Reduction, list[list[tuple[float, float]]]]
    """Pairs of the share of the layer's FLOPs saved and the KL in nats, per reduction and layer."""
    plans: Mapping[str, list[float]]
    """Share of FLOPs that each layer saves, per level."""
    thresholds: dict[int, float]
    """Threshold of each checkpoint, by layer."""
    exits: tuple[tuple[float, Quality], ...]
    """Hard exits beside the levels: share of tokens that exit at each checkpoint, and the quality."""
    tiers: tuple[TierRecord, ...]
    tier_qualities: dict[str, Quality]


def calibrate(
    model: ReducedModel,
    probe_set: artifact.ProbeSet,
    texts: Sequence[str],
    *,
    max_length: int = 512,
    exit_rates: Sequence[float] = (),
    targets: Mapping[str, Target] = TARGETS,
    statistics: Statistics | None = None,
) -> Calibration:
    """Make levels and tiers from `texts`: a fourth of them measures what the others made.

    `exit_rates`, one per checkpoint, set the thresholds anew; `statistics` are those that the serving engine recorded.

    Raises:
        ConfigError: the probe set is of another model, the texts are too few, or the rates don't fit the checkpoints.
    """
    manifest = probe_set.manifest
    if (manifest.num_layers, manifest.hidden_size) != (model.num_layers, model.hidden_size):
        shape = f"{model.num_layers} layers of hidden size {model.hidden_size}"
        raise ConfigError(
            f"probe set {manifest.name} is for {manifest.num_layers} layers of hidden size {manifest.hidden_size}, the model has {shape}"
        )
    if len(texts) < 4:
        raise ConfigError(f"{len(texts)} texts to calibrate with; name at least 4")
    if exit_rates and (len(exit_rates) != len(manifest.probes) or not all(0 <= rate < 1 for rate in exit_rates)):
        raise ConfigError(f"exit rates {list(exit_rates)} for {len(manifest.probes)} checkpoints; give each one rate from 0 to below 1")
    batches = model.make_batches([t for i, t in enumerate(texts) if i % 4 != 3], max_length=max_length)
    check = model.make_batches(texts[3::4], max_length=max_length)
    few = batches[len(batches) // 2 :: max(1, len(batches) // 6)][:_FEW]  # not the shortest
    risks = get_risks(model, batches, probe_set.probes)
    thresholds = {p.layer: p.threshold for p in manifest.probes} | (set_thresholds(risks, exit_rates) if exit_rates else {})
    probes = [replace(p, threshold=thresholds[p.layer]) for p in manifest.probes]
    neurons = describe_neurons(model, batches, statistics)
    # The score: whichever costs less where half of each layer's neurons stay.
    half = {score: sum(curve[0][1] for curve in measure_curves(model, few, "contextual", neurons, score, points=(0.5,))) for score in SCORES}
    score = min(SCORES, key=lambda s: half[s])
    curves = {reduction: measure_curves(model, few, reduction, neurons, score) for reduction in REDUCTIONS}
    plans: dict[str, list[float]] = {}

    def make(reduction: Reduction, saved: float) -> Level:
        """Plan the savings of one level, and make it."""
        name = f"{reduction}-{saved * 100:.0f}"
        plans[name] = plan_savings(curves[reduction], saved)
        return make_level(model, few, name, reduction, plans[name], neurons, score)

    def at(level: Level) -> AtLevel:
        """Return the form in which every token is at one level."""
        return AtLevel(level, neurons, model.activation, score)

    neurons = fit_repair(model, batches, [make("contextual", saved) for saved in _REPAIR_SAVINGS], neurons, score)
    levels = [make(reduction, saved) for reduction in REDUCTIONS for saved in SAVINGS[reduction]]
    exits = [Decided(probe_set.probes, {n: Knobs(threshold=t) for n, t in set_thresholds(risks, [r] * len(probes)).items()}) for r in _EXITS]
    measured = model.measure(check, [*(at(level) for level in levels), *exits])
    pairs = sorted(zip(measured, levels, strict=False), key=lambda pair: pair[0].saved)
    qualities, levels = [q for q, _ in pairs], [level for _, level in pairs]
    by_name, full_N = {level.name: level for level in levels}, model.get_logprobs(check, Plain())[0]

    def make_tier(floor: Level, level: Level, scale: float) -> Decided:
        """Return the form of a tier with these levels and this threshold scale."""
        return Decided(probe_set.probes, {p.layer: Knobs(threshold=p.threshold * scale) for p in probes}, floor=at(floor), level=at(level))

    with tqdm(desc="tiers", unit="try") as bar:

        def measure(floor: Level, level: Level, scale: float) -> tuple[float, float]:
            """Return what such a tier saves (share of MLP FLOPs) and costs (perplexity ratio)."""
            bar.update()
            logprobs_N, saved = model.get_logprobs(check, make_tier(floor, level, scale))
            return saved, math.exp((full_N - logprobs_N).double().mean().item())

        scales = find_scales(risks, probes)
        tiers = [find_tier(name, target, levels, qualities, scales, measure) for name, target in targets.items()]
    reducing = [t for t in tiers if t.floor != FULL]
    found = model.measure(check, [make_tier(by_name[t.floor], by_name[t.level], t.threshold_scale) for t in reducing], "tiers found")
    return Calibration(
        levels=tuple(levels),
        neurons=neurons,
        score=score,
        qualities=tuple(qualities),
        damage=curves,
        plans={level.name: plans[level.name] for level in levels},
        thresholds=thresholds,
        exits=tuple(zip(_EXITS, measured[len(levels) :], strict=True)),
        tiers=tuple(tiers),
        tier_qualities={t.name: quality for t, quality in zip(reducing, found, strict=True)},
    )


def write(out: Path, model: ReducedModel, probe_set: artifact.ProbeSet, made: Calibration, training: dict[str, Any]) -> Manifest:
    """Write the probe set with the levels, the tiers and the thresholds; its probes stay."""
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
        probes=tuple(replace(p, threshold=made.thresholds[p.layer]) for p in probe_set.manifest.probes),
        intermediate_size=model.intermediate_size,
        activation=model.activation,
        score=made.score,
        levels=tuple(records),
        tiers=made.tiers,
        training=probe_set.manifest.training | {"calibration": training},
    )
    return artifact.save(out, manifest, probe_set.probes, levels=made.levels, neurons=made.neurons)
