"""What `distill` shows of all candidates: a table, distill.json and distill.png."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from sedac_probes.drafts.candidates import POSITIONS, Candidate


def make_table(candidates: Sequence[Candidate]) -> Table:
    """Return the candidates, the best first."""
    at = (f"at {i + 1}" for i in range(POSITIONS))
    at = (f"at {i + 1}" for i in range(POSITIONS))
    table = Table(
        "draft", "layers", "parameters", *at, "loss (untrained)", "pass / step", f"predicted, {POSITIONS} tokens", "measured", "best limits",
        "predicted", title="held-out acceptance by position; speed-up over plain decoding at batch 1", box=None,
    )  # fmt: skip
    for c in candidates:
        loss = "-" if c.heldout_loss is None else f"{c.heldout_loss:.3f} ({c.losses[0][1]:.3f})"
        share = f"{c.draft_share:.2f}{'' if c.is_measured else ' (estimated)'}"
        measured = "-" if c.measured is None else f"{c.measured:.2f}"
        limits = f"{c.proposal.max_tokens} tokens, confidence {c.proposal.min_confidence:.1f}"
        speedups = (f"{c.predicted:.2f}", measured, limits, f"{c.proposal.speedup:.2f}")
        table.add_row(c.name, str(c.depth), f"{c.num_parameters:,}", *(f"{a:.3f}" for a in c.acceptance), loss, share, *speedups)
    return table


def write(directory: Path, candidates: Sequence[Candidate]) -> None:
    """Write distill.json and distill.png."""
    directory.mkdir(parents=True, exist_ok=True)
    written = {"kind": "distill", "candidates": [asdict(c) for c in candidates]}
    (directory / "distill.json").write_text(json.dumps(written, indent=1) + "\n")
    _draw(directory / "distill.png", candidates)


def _draw(path: Path, candidates: Sequence[Candidate]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for c in candidates:
        left.plot(range(1, len(c.acceptance) + 1), c.acceptance, marker="o", label=f"{c.name}: {c.tokens_per_step:.2f} tokens a step")
        if c.losses:
            right.plot([step for step, _ in c.losses], [loss for _, loss in c.losses], label=c.name)
    left.set(xlabel="position of the draft token", ylabel="accepted, those before it accepted", xticks=range(1, POSITIONS + 1), ylim=(0, 1))
    right.set(xlabel="step", ylabel="held-out cross-entropy to the full model, nats")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
