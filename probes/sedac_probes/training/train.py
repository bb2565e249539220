"""Train: fit one LREProbe per checkpoint, on a collection, to the final entropy or to the measured damage; hold-out by document.

Called by the command `train`. It writes nothing. N tokens, D hidden size.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from scipy import stats
from sedac.errors import ConfigError
from sedac.probe.probe import LREProbe
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from sedac_probes.collecting.collection import read_collection, read_description
from sedac_probes.training.damage import is_heldout, read_damage

__all__ = ["TARGET", "TrainedProbe", "read_collection", "read_description", "train_probe"]

Target = Literal["entropy", "damage"]
Transform = Literal["log", "rank"]
TARGET = "log1p(final entropy in nats)"
_HUBER_BETA = 0.5
_PATIENCE = 3
_NUM_BINS = 10


@dataclass(frozen=True, kw_only=True)
class TrainedProbe:
    """A probe and how it did on held-out documents."""

    probe: LREProbe
    risk: Tensor
    """Risk of the held-out tokens, fp32 (N,)."""
    spearman: float
    """Rank correlation of risk and the target, held out."""
    spearman_damage: float | None
    """Rank correlation of risk and measured damage, held out. None where not measured."""
    huber: float
    """Held-out loss."""
    calibration: tuple[dict[str, float], ...]
    """Mean risk and mean clipped target by decile of risk, held out."""
    overconfident: dict[str, float]
    """Share of held-out tokens whose risk is below the clipped target, and by how much on average (`size`)."""
    underconfident: dict[str, float]
    """The same for tokens whose risk is above it."""
    losses: tuple[float, ...]
    """Held-out loss after each epoch. Training stopped after the last, and the best one's weights are kept."""


def describe_target(target: Target, transform: Transform, level: str = "skip") -> str:
    """Say in words what risk predicts, for the manifest."""
    if target == "entropy":
        return TARGET
    kind = "log1p(damage / median)" if transform == "log" else "rank of damage"
    return f"{kind}, damage being the KL of this token's MLPs at {level} above the checkpoint, in nats"


def make_target(damage_N: Tensor, trained_N: Tensor, transform: Transform) -> Tensor:
    """Return what a probe is fitted to: log1p(damage / median damage), or the share of training tokens with less damage."""
    known = damage_N[trained_N].sort().values
    if transform == "log":
        return (damage_N / known[len(known) // 2].clamp(min=1e-9)).log1p()
    return torch.searchsorted(known, damage_N.contiguous()).float() / len(known)


def train_probe(
    directory: Path,
    layer: int,
    *,
    target: Target = "entropy",
    damage: Path | None = None,
    transform: Transform = "rank",
    rank: int = 64,
    max_epochs: int = 20,
    batch_size: int = 1024,
    lr: float = 2e-3,
    weight_decay: float = 0.01,
    seed: int = 0,
) -> TrainedProbe:
    """Fit the probe of one layer: Huber loss (beta 0.5) on the target clipped to its 1st-99th percentile, AdamW, early stopping.

    `damage`: directory of `damage.measure_collection`; with target `damage` it must cover the whole collection.

    Raises:
        ConfigError: a value is out of range, too few documents, or damage was not measured.
    """
    for name, value in (("rank", rank), ("epochs", max_epochs), ("batch-size", batch_size), ("lr", lr)):
        if value <= 0:
            raise ConfigError(f"--{name} is {value}; give a number over 0")
    stream_ND, entropy_N, document_N = read_collection(directory, layer)
    heldout_N = is_heldout(document_N)
    if heldout_N.all() or not heldout_N.any():
        raise ConfigError(f"collection {directory} has only one document, or none held out; training needs at least 2, collect with more --samples")
    damage_N = read_damage(damage, layer, document_N) if damage else torch.full(document_N.shape, torch.nan)
    target_N = entropy_N
    if target == "damage":
        if damage_N.isnan().any():
            raise ConfigError(f"damage of layer {layer} is measured for {1 - damage_N.isnan().float().mean():.0%} of {directory}; measure all of it")
        target_N = make_target(damage_N, ~heldout_N, transform)
    low, high = torch.quantile(target_N[~heldout_N][:1_000_000], torch.tensor([0.01, 0.99]))
    clipped_N = target_N.clamp(low, high)
    generator = torch.Generator().manual_seed(seed * 1000 + layer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * 1000 + layer)
        probe = LREProbe(stream_ND.shape[1], rank)
    losses = _fit(
        probe, stream_ND, clipped_N, heldout_N, generator, f"train layer {layer}",
        max_epochs=max_epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay,
    )  # fmt: skip
    with torch.no_grad():
        risk_N = probe(stream_ND[heldout_N])
    measured_N = damage_N[heldout_N]
    return TrainedProbe(
        probe=probe,
        risk=risk_N,
        spearman=_correlate(risk_N, target_N[heldout_N]),
        spearman_damage=None if measured_N.isnan().any() else _correlate(risk_N, measured_N),
        huber=min(losses),
        losses=tuple(losses),
        **describe_errors(risk_N, clipped_N[heldout_N]),  # type: ignore[arg-type]
    )


def _fit(
    probe: LREProbe, stream_ND: Tensor, target_N: Tensor, heldout_N: Tensor, generator: torch.Generator, label: str,
    *, max_epochs: int, batch_size: int, lr: float, weight_decay: float,
) -> list[float]:  # fmt: skip
    """Train until the held-out loss has not fallen for three epochs, and leave the best weights; returns its course."""
    optimizer = torch.optim.AdamW(probe.parameters(), lr=lr, weight_decay=weight_decay)
    rows = (~heldout_N).nonzero().squeeze(1)
    kept, losses = copy.deepcopy(probe.state_dict()), []
    held_ND, held_N = stream_ND[heldout_N], target_N[heldout_N]
    bar = tqdm(range(max_epochs), desc=label, unit="epoch")
    for _ in bar:
        for batch in rows[torch.randperm(len(rows), generator=generator)].split(batch_size):
            loss = functional.huber_loss(probe(stream_ND[batch]), target_N[batch], delta=_HUBER_BETA)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            losses.append(functional.huber_loss(probe(held_ND), held_N, delta=_HUBER_BETA).item())
        bar.set_postfix(heldout=f"{losses[-1]:.4f}")
        best = losses.index(min(losses))
        if best == len(losses) - 1:
            kept = copy.deepcopy(probe.state_dict())
        if len(losses) - 1 - best >= _PATIENCE:
            break
    bar.close()
    probe.load_state_dict(kept)
    probe.eval().requires_grad_(False)
    return losses


def _correlate(risk_N: Tensor, other_N: Tensor) -> float:
    return float(stats.spearmanr(risk_N.numpy(), other_N.numpy()).statistic)


def describe_errors(risk_N: Tensor, target_N: Tensor) -> dict[str, object]:
    """Return the calibration curve by decile of risk, and over- and under-confidence, as `TrainedProbe` has them."""
    bins = torch.argsort(risk_N).tensor_split(_NUM_BINS)
    error_N = risk_N - target_N

    def describe(side_N: Tensor) -> dict[str, float]:
        """Return the share of the tokens on one side, and the mean size of their errors."""
        return {"share": side_N.float().mean().item(), "size": error_N[side_N].abs().mean().item() if side_N.any() else 0.0}

    return {
        "calibration": tuple({"predicted": risk_N[b].mean().item(), "observed": target_N[b].mean().item()} for b in bins if len(b)),
        "overconfident": describe(error_N < 0),
        "underconfident": describe(error_N > 0),
    }
