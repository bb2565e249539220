"""Train: fit one LREProbe per checkpoint to log1p of the final entropy, on a collection, hold-out by document."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from scipy import stats
from sedac.errors import ConfigError
from sedac.probe.probe import LREProbe
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

TARGET = "log1p(final entropy in nats)"
_HELDOUT_EVERY = 10  # every tenth document
_HUBER_BETA = 0.5
_PATIENCE = 3


@dataclass(frozen=True, kw_only=True)
class TrainedProbe:
    """A probe and how it did on held-out documents."""

    probe: LREProbe
    risk: Tensor
    """its risk on the held-out tokens, fp32 (N,)"""
    spearman: float
    """rank correlation of risk and true entropy, held out"""
    huber: float
    """held-out loss"""


def read_collection(directory: Path, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (stream (N, D) fp32, log1p entropy (N,), document (N,)) of one layer over all shards.

    Raises:
        ConfigError: the collection has no shards or lacks the layer.
    """
    streams, targets, documents = [], [], []
    for path in sorted(directory.glob("shard-*.safetensors")):
        shard = safetensors.torch.load_file(path)
        if f"stream.{layer}" not in shard:
            raise ConfigError(f"{path} has no stream of layer {layer}; collect again with --layers naming it")
        streams.append(shard[f"stream.{layer}"].float())
        targets.append(shard["entropy"].log1p())
        documents.append(shard["document"])
    if not streams:
        raise ConfigError(f"no shards in {directory}; run `sedac-probes collect` first")
    return torch.cat(streams), torch.cat(targets), torch.cat(documents)


def train_probe(directory: Path, layer: int, *, rank: int = 64, max_epochs: int = 20, batch_size: int = 1024, lr: float = 2e-3) -> TrainedProbe:
    """Fit the probe of one layer: Huber loss (beta 0.5) on the target clipped to its 1st-99th percentile, AdamW, early stopping."""
    stream_ND, target_N, document_N = read_collection(directory, layer)
    if not stream_ND.isfinite().all() or not target_N.isfinite().all():
        raise ConfigError(f"collection {directory} holds NaN or infinity at layer {layer}; check the model's dtype and collect again")
    heldout_N = document_N % _HELDOUT_EVERY == 0
    low, high = torch.quantile(target_N[~heldout_N][:1_000_000], torch.tensor([0.01, 0.99]))
    clipped_N = target_N.clamp(low, high)
    torch.manual_seed(layer)
    probe = LREProbe(stream_ND.shape[1], rank)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=lr, weight_decay=0.01)
    rows = (~heldout_N).nonzero().squeeze(1)
    best, best_loss, since = copy.deepcopy(probe.state_dict()), float("inf"), 0
    bar = tqdm(range(max_epochs), desc=f"train layer {layer}", unit="epoch")
    for _ in bar:
        for batch in rows[torch.randperm(len(rows))].split(batch_size):
            loss = functional.huber_loss(probe(stream_ND[batch]), clipped_N[batch], delta=_HUBER_BETA)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            held = functional.huber_loss(probe(stream_ND[heldout_N]), clipped_N[heldout_N], delta=_HUBER_BETA).item()
        bar.set_postfix(heldout=f"{held:.4f}")
        since += 1
        if held < best_loss - 1e-5:
            best, best_loss, since = copy.deepcopy(probe.state_dict()), held, 0
        if since >= _PATIENCE:
            break
    bar.close()
    probe.load_state_dict(best)
    probe.eval().requires_grad_(False)
    risk_N = probe(stream_ND[heldout_N])
    correlation = float(stats.spearmanr(risk_N.numpy(), target_N[heldout_N].numpy()).statistic)
    return TrainedProbe(probe=probe, risk=risk_N, spearman=correlation, huber=best_loss)


def read_description(directory: Path) -> dict[str, object]:
    """Read collection.json.

    Raises:
        ConfigError: there is none.
    """
    path = directory / "collection.json"
    if not path.is_file():
        raise ConfigError(f"{path} is missing; run `sedac-probes collect` first")
    description: dict[str, object] = json.loads(path.read_text())
    return description
