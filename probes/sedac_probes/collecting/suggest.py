"""Suggest: choose checkpoint layers from data, by how well each layer tells the uncertain tokens and how much work is left after it.

Called by `collect`. A ridge regression stands in for each layer's probe: quick, and good enough to rank layers. A set of layers is
judged as a cascade: tokens leave at the first checkpoint that puts them among its safest share, and that share is set so that the
cascade saves `SAVING` of the MLPs. What is saved on tokens of high entropy is saved badly, so the set wins whose saved layers fall on
the least entropy: a late layer that knows more must let more tokens go, an early one that knows less lets the wrong ones go.
N tokens, L layers, C checkpoints of a set, S sets.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from scipy import stats
from torch import Tensor
from tqdm import tqdm

SAVING = 0.1
_NUM_CHECKPOINTS = 3
_NUM_DOCUMENTS = 24
_DOCUMENTS_AT_ONCE = 4  # all layers' streams are held: four documents at a time bound them in the engine
_TOKENS_PER_DOCUMENT = 256
_HELDOUT_EVERY = 3
_RIDGE = 1e-2
_SETS_AT_ONCE = 64
_STEPS = 12  # of the bisection


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """The layers chosen, and what every layer is worth."""

    layers: tuple[int, ...]
    spearman: tuple[float, ...]
    """Rank correlation of the ridge probe's risk with the entropy on held-out documents, per layer."""
    cost: float
    """Mean log1p entropy under the saved layers, against the mean of all tokens. Below 1 is better than chance."""


def choose(streams: dict[int, Tensor], entropy_N: Tensor, document_N: Tensor, num_layers: int) -> Suggestion:
    """Choose up to three layers; `streams` (N, D) are by layer, documents are held out by number.

    Deterministic: of sets that cost the same, the one with the earlier layers wins.
    """
    target_N = entropy_N.log1p().double()
    heldout_N = document_N % _HELDOUT_EVERY == 0
    layers = sorted(streams)
    risks = {layer: _fit_ridge(streams[layer], target_N, heldout_N) for layer in layers}
    true_N = target_N[heldout_N]
    correlation = [float(stats.spearmanr(risks[layer].numpy(), true_N.numpy()).statistic) for layer in layers]
    rank_LN = torch.stack([risks[layer].argsort().argsort().double() / max(1, len(true_N)) for layer in layers])
    left_L = torch.tensor([(num_layers - 1 - layer) / num_layers for layer in layers], dtype=torch.float64)
    sets = list(itertools.combinations(range(len(layers)), min(_NUM_CHECKPOINTS, len(layers))))
    costs = torch.cat([_judge(some_SC, rank_LN, left_L, true_N) for some_SC in torch.tensor(sets).split(_SETS_AT_ONCE)])
    best = int(costs.argmin())
    return Suggestion(layers=tuple(layers[i] for i in sets[best]), spearman=tuple(correlation), cost=float(costs[best] / true_N.mean()))


def _fit_ridge(stream_ND: Tensor, target_N: Tensor, heldout_N: Tensor) -> Tensor:
    """Return predictions for the held-out tokens."""
    known_ND = stream_ND[~heldout_N].double()
    mean_D, std_D = known_ND.mean(0), known_ND.std(0).clamp(min=1e-6)
    x_ND = (known_ND - mean_D) / std_D
    gram_DD = x_ND.T @ x_ND
    gram_DD.diagonal().add_(_RIDGE * len(x_ND))
    y_N = target_N[~heldout_N]
    weight_D = torch.linalg.solve(gram_DD, x_ND.T @ (y_N - y_N.mean()))
    return ((stream_ND[heldout_N].double() - mean_D) / std_D) @ weight_D + y_N.mean()


def _judge(sets_SC: Tensor, rank_LN: Tensor, left_L: Tensor, true_N: Tensor) -> Tensor:
    """Return the mean of the target under the layers that each set saves (S,); infinity where it can't save enough."""
    rank_SCN, left_SC = rank_LN[sets_SC], left_L[sets_SC]
    low_S, high_S = torch.zeros(len(sets_SC), dtype=torch.float64), torch.ones(len(sets_SC), dtype=torch.float64)

    def get_saved(share_S: Tensor) -> Tensor:
        """Return what each token saves under each set, where these shares of the tokens are let go."""
        leaves_SCN = rank_SCN < share_S[:, None, None]
        earliest_SCN = leaves_SCN & (leaves_SCN.cumsum(1) == 1)
        return (earliest_SCN * left_SC[:, :, None]).sum(1)

    for _ in range(_STEPS):
        middle_S = (low_S + high_S) / 2
        enough_S = get_saved(middle_S).mean(1) >= SAVING
        low_S, high_S = torch.where(enough_S, low_S, middle_S), torch.where(enough_S, middle_S, high_S)
    saved_SN = get_saved(high_S)
    cost_S = (saved_SN * true_N).sum(1) / saved_SN.sum(1)
    return torch.where(saved_SN.mean(1) >= SAVING, cost_S, torch.inf)


def suggest_layers(record: Callable[[list[list[int]]], dict[str, Tensor]], prompts: Sequence[list[int]], num_layers: int) -> tuple[int, ...]:
    """Record a few of the documents at all layers, print the table and return the choice; `record` gives a shard's tensors for token ids."""
    step = max(1, len(prompts) // _NUM_DOCUMENTS)
    chosen = [ids[:_TOKENS_PER_DOCUMENT] for ids in prompts[::step][:_NUM_DOCUMENTS]]
    parts: dict[str, list[Tensor]] = {}
    starts = range(0, len(chosen), _DOCUMENTS_AT_ONCE)
    for start in tqdm(starts, desc="suggest", unit="batch"):
        for name, values in record(chosen[start : start + _DOCUMENTS_AT_ONCE]).items():
            if name == "document":
                parts.setdefault(name, []).append(values + start)
            elif name == "entropy" or name.startswith("stream."):
                parts.setdefault(name, []).append(values)
    whole = {name: torch.cat(pieces) for name, pieces in parts.items()}
    streams = {int(name.removeprefix("stream.")): t for name, t in whole.items() if name.startswith("stream.")}
    made = choose(streams, whole["entropy"], whole["document"], num_layers)
    table = Table("layer", "rank correlation", "MLPs left after it", "chosen", title=f"{len(whole['entropy'])} tokens, ridge probes", box=None)
    for layer, correlation in zip(sorted(streams), made.spearman, strict=True):
        left = (num_layers - 1 - layer) / num_layers
        table.add_row(str(layer), f"{correlation:.3f}", f"{left:.0%}", "*" if layer in made.layers else "")
    console = Console()
    console.print(table)
    console.print(
        f"chosen: {', '.join(map(str, made.layers))}; with {SAVING:.0%} of the MLPs saved, they fall on {made.cost:.2f} of the mean log1p entropy"
    )
    return made.layers
