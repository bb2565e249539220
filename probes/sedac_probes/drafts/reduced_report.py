"""What the search of a reduced draft saw, as terminal tables, as JSON and as a picture. Called by the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sedac_probes.drafts.reduced import Made
from sedac_probes.drafts.search import Choice

_NUM_ALONE, _NUM_PATH = 12, 12
_LINES = (0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5)
"""Speed-ups that are drawn as lines."""


def print_report(made: Made) -> None:
    """Print costs, the parts that cost least acceptance, the path of the search, and the draft in the engine."""
    costs, best = made.costs, made.found.best
    console = Console(width=None if Console().is_terminal else 200)
    table = Table("part", "ms", "of a plain step", title="costs at batch 1", box=None)
    parts = {"plain step": costs.plain, "step that verifies": costs.verify, "each draft verified": costs.row}
    parts |= {"draft pass without layers": costs.base, "attention": costs.attention}
    for name, seconds in (parts | {f"MLP, {level}": seconds for level, seconds in costs.mlps.items()}).items():
        table.add_row(name, f"{seconds * 1e3:.3f}", f"{seconds / costs.plain:.3f}")
    console.print(table)
    alone = sorted(made.found.alone, key=lambda choice: -choice.judged.longest.tokens_per_step)[:_NUM_ALONE]
    console.print(_make_table(alone, f"one part left out, or a level: the {len(alone)} that cost least acceptance"))
    path = [*made.found.path[:: max(1, len(made.found.path) // _NUM_PATH)], best]
    console.print(_make_table(path, "one part after the other; last: the best, after swaps"))
    limits = f"up to {best.proposal.max_tokens} drafts, stopping below {best.proposal.min_confidence:g}"
    table = Table("", "accepted by position", "tokens per step", "speed-up", title=f"answers kept aside, {limits}", box=None)
    table.add_row("reference, cost model", _join(made.rollout.acceptance), f"{made.rollout.tokens_per_step:.3f}", f"{made.predicted:.3f}")
    if made.trial:
        length = best.proposal.max_tokens
        found = made.trial.decodings[length]
        tokens = f"{found.num_tokens / found.num_steps:.3f}"
        table.add_row("engine", _join(made.trial.get_acceptance(length)), tokens, f"{made.trial.get_speedup(length):.3f}")
    console.print(table)


def _make_table(choices: Sequence[Choice], title: str) -> Table:
    table = Table("left out", "pass / step", "accepted by position", "best limits", "predicted speed-up", title=title, box=None)
    for choice in choices:
        limits = f"{choice.proposal.max_tokens} tokens, confidence {choice.proposal.min_confidence:.1f}"
        share = f"{choice.costs.draft_pass / choice.costs.plain:.3f}"
        table.add_row(choice.left_out.describe(), share, _join(choice.judged.longest.acceptance), limits, f"{choice.speedup:.3f}")
    return table


def _join(shares: Sequence[float]) -> str:
    return " ".join(f"{share:.2f}" for share in shares)


def write(directory: Path, made: Made) -> None:
    """Write reduced.json, which has every draft that was tried, and reduced.png."""
    directory.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = {
        "kind": "reduced",
        "manifest": asdict(made.manifest),
        "costs": asdict(made.costs),
        "best": _to_dict(made.found.best),
        "heldout": {"rollout": asdict(made.rollout), "predicted_speedup": made.predicted, "trial": made.trial and asdict(made.trial)},
        "alone": [_to_dict(choice) for choice in made.found.alone],
        "path": [_to_dict(choice) for choice in made.found.path],
        "tried": [_to_dict(choice) for choice in made.found.tried],
    }
    (directory / "reduced.json").write_text(json.dumps(data, indent=1) + "\n")
    _draw(directory / "reduced.png", made)


def _to_dict(choice: Choice) -> dict[str, Any]:
    return {
        "left_out": choice.left_out.to_dict(), "acceptance": list(choice.judged.longest.acceptance),
        "pass_share": choice.costs.draft_pass / choice.costs.plain, **asdict(choice.proposal),
    }  # fmt: skip


def _draw(path: Path, made: Made) -> None:
    """Draw acceptance of the first draft against the cost of a pass: all drafts tried, the path, the choice, and lines of equal speed-up."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    best = made.found.best
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")

    def place(choices: Sequence[Choice]) -> tuple[list[float], list[float]]:
        """Return the cost of a draft pass in plain steps, and the acceptance of the first draft, of each draft."""
        return [c.costs.draft_pass / c.costs.plain for c in choices], [c.judged.longest.acceptance[0] for c in choices]

    axes.plot(*place(made.found.tried), "o", markersize=2.5, color="0.7", label=f"{len(made.found.tried)} drafts tried")
    axes.plot(*place(made.found.alone), "v", markersize=4, color="tab:blue", label="one part left out, or a level")
    axes.plot(*place(made.found.path), "-s", markersize=4, linewidth=1, color="tab:orange", label="one part after the other")
    axes.plot(*place([best]), "*", markersize=16, color="tab:red", label=f"chosen: {best.left_out.describe()}")
    cost_X, share_Y = np.linspace(*axes.get_xlim(), 60), np.linspace(*axes.get_ylim(), 60)
    axes.set(ylim=axes.get_ylim())
    verify, row = best.costs.verify / best.costs.plain, best.costs.row / best.costs.plain
    speedup_YX = np.max(
        [_predict(cost_X[None] + row, share_Y[:, None], verify, n) for n in range(1, len(best.judged.longest.acceptance) + 1)], axis=0
    )
    axes.clabel(axes.contour(cost_X, share_Y, speedup_YX, levels=_LINES, colors="0.4", linewidths=0.7), fmt="%gx", fontsize=7)
    axes.set(xlabel="cost of a draft pass, in plain steps", ylabel="first drafts accepted")
    axes.set_title(f"parts of {made.manifest.model} left out; lines: speed-up if all drafts were accepted as often as the first", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="lower right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _predict(cost: Any, acceptance: Any, verify: float, num_drafts: int) -> Any:
    """Return the speed-up where every draft is accepted with the same probability; times in plain steps."""
    return sum(acceptance**n for n in range(num_drafts + 1)) / (verify + num_drafts * cost)
