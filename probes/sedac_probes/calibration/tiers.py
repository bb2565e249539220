"""Tiers: the search for a floor, a level of confident tokens and a threshold scale within a bound. Called by `calibrate`.

N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from sedac.probe.levels import Level
from sedac.probe.manifest import ProbeRecord, TierRecord
from sedac.probe.probe import LREProbe
from torch import Tensor

from sedac_probes.calibration.reduced import Batch, Plain, Quality, ReducedModel

SHARES = (0.1, 0.3, 0.6)
"""Shares of the tokens at a checkpoint that a tier may find confident. The scales that are tried let about so many exit."""
_MARGIN = 0.85  # of what a target's ratio allows over 1: the best of many tries on one text looks better than it is
_FLOORS = 2
_GOALS = 2

Measure = Callable[[Level, Level, float], tuple[float, float]]
"""Returns what floor, level of confident tokens and threshold scale save (share of MLP FLOPs) and cost (perplexity ratio)."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a tier shall do; one of the two is given."""

    max_ratio: float | None = None
    """Limit of the perplexity ratio: the most saving tier within it, with a margin, is searched."""
    min_saved: float | None = None
    """Least share of MLP FLOPs saved: the tier that saves it at the lowest perplexity ratio is searched."""


class _Risks(Plain):
    """Keeps the risks of the full model's tokens at every checkpoint."""

    def __init__(self, probes: Mapping[int, LREProbe]) -> None:
        self.probes = probes
        self.risks: dict[int, list[Tensor]] = {layer: [] for layer in probes}

    def begin(self, batch: Batch) -> None:
        self.real_T = batch.real_BS.flatten()

    def watch(self, layer: int, stream_TD: Tensor) -> None:
        if layer in self.probes:
            self.risks[layer].append(self.probes[layer](stream_TD[self.real_T]))


@torch.inference_mode()
def get_risks(model: ReducedModel, batches: Sequence[Batch], probes: Mapping[int, LREProbe]) -> dict[int, Tensor]:
    """Return per checkpoint the risk (N,) of every token of the text, the model in full."""
    watching = _Risks(probes)
    for batch in batches:
        model.run(batch, watching)
    return {layer: torch.cat(found) for layer, found in watching.risks.items()}


def set_thresholds(risks: Mapping[int, Tensor], rates: Sequence[float]) -> dict[int, float]:
    """Return the threshold per checkpoint at which `rates` of the tokens evaluated there exit, under rule `first`.

    Tokens that exit at one checkpoint are not evaluated at the next.
    """
    thresholds, left_N = {}, torch.ones_like(next(iter(risks.values())), dtype=torch.bool)
    for (layer, risk_N), rate in zip(sorted(risks.items()), rates, strict=True):
        rest = risk_N[left_N]
        thresholds[layer] = rest.quantile(rate).item() if rate > 0 and len(rest) else 0.0
        left_N = left_N & ~(risk_N < thresholds[layer])
    return thresholds


def find_scales(risks: Mapping[int, Tensor], probes: Sequence[ProbeRecord]) -> list[float]:
    """Return the threshold scales at which about each of SHARES of the tokens lies below a checkpoint's threshold."""
    scales = []
    for share in SHARES:
        ratios = [risks[p.layer].quantile(share).item() / p.threshold for p in probes if p.threshold > 0]
        scales += [sorted(ratios)[len(ratios) // 2]] if ratios else []
    return sorted({float(f"{scale:.4g}") for scale in scales})


def find_tier(
    name: str, target: Target, levels: Sequence[Level], qualities: Sequence[Quality], scales: Sequence[float], measure: Measure
) -> TierRecord:
    """Return the tier that meets the target best; one that reduces nothing, where nothing else meets it.

    `qualities` are those of all tokens at one level. Floors are tried from the most saving that meets the bound downwards, above
    each one the next levels of its kind for confident tokens, at growing scales until the bound is passed.
    """
    order = sorted(range(len(levels)), key=lambda i: qualities[i].saved, reverse=True)
    if target.max_ratio is not None:
        limit = 1 + _MARGIN * (target.max_ratio - 1)
        floors = [i for i in order if qualities[i].perplexity_ratio <= limit][:_FLOORS]
    else:
        enough = [i for i in order if qualities[i].saved >= (target.min_saved or 0.0)]
        limit = min((qualities[i].perplexity_ratio for i in enough), default=float("inf"))
        floors = sorted(enough, key=lambda i: qualities[i].perplexity_ratio)[:1] + [i for i in order if i not in enough][:_FLOORS]
    best: tuple[TierRecord, float, float] | None = None

    def keep(floor: Level, level: Level, scale: float, saved: float, ratio: float) -> bool:
        """Keep a tier that is the best so far, and return whether its perplexity ratio is within the limit."""
        nonlocal best
        fits = ratio <= limit and saved >= (target.min_saved or 0.0)
        if fits and (best is None or (saved > best[1] if target.max_ratio is not None else ratio < best[2])):
            best = TierRecord(name=name, floor=floor.name, level=level.name, threshold_scale=scale), saved, ratio
        return ratio <= limit

    for i in floors:
        keep(levels[i], levels[i], 1.0, qualities[i].saved, qualities[i].perplexity_ratio)
        goals = [j for j in reversed(order) if levels[j].reduction == levels[i].reduction and qualities[j].saved > qualities[i].saved][:_GOALS]
        for j in goals:
            for scale in scales:
                if not keep(levels[i], levels[j], scale, *measure(levels[i], levels[j], scale)):
                    break
    return best[0] if best else TierRecord(name=name, floor="full", level="full")
