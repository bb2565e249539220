"""Results as a terminal table, as JSON and as a picture: quality against saved MLP FLOPs. Called by the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.table import Table

from sedac_probes.calibration.reduced import Quality

Points = Mapping[str, Sequence[tuple[str, Quality]]]
"""What varies within a mechanism, and the quality there, per mechanism."""


def print_points(points: Points, title: str) -> None:
    """Print one row per mechanism and variant."""
    table = Table("mechanism", "at", "MLP FLOPs saved", "perplexity ratio", "agreement", "KL, nats", title=title, box=None)
    for mechanism, rows in points.items():
        for variant, q in rows:
            table.add_row(mechanism, variant, f"{q.saved:.1%}", f"{q.perplexity_ratio:.4f}", f"{q.agreement:.4f}", f"{q.kl:.5f}")
    Console().print(table)


def interpolate(rows: Sequence[tuple[str, Quality]], saved: float) -> float | None:
    """Return the perplexity ratio at `saved`, linear between a mechanism's points and (0, 1); None beyond its last."""
    points = sorted([(0.0, 1.0), *((q.saved, q.perplexity_ratio) for _, q in rows)])
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= saved <= x1 and x1 > x0:
            return y0 + (y1 - y0) * (saved - x0) / (x1 - x0)
    return None


def print_equal_savings(points: Points, savings: Sequence[float]) -> dict[str, list[float | None]]:
    """Print and return each mechanism's perplexity ratio at equal saving."""
    table = Table("perplexity ratio at saved MLP FLOPs", *(f"{s:.0%}" for s in savings), box=None)
    result = {mechanism: [interpolate(rows, s) for s in savings] for mechanism, rows in points.items()}
    for mechanism, ratios in result.items():
        table.add_row(mechanism, *("-" if r is None else f"{r:.4f}" for r in ratios))
    Console().print(table)
    return result


def write_json(path: Path, points: Points, **more: Any) -> None:
    """Write everything that the table shows."""
    rows = {mechanism: [{"at": variant, **asdict(q)} for variant, q in found] for mechanism, found in points.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**more, "mechanisms": rows}, indent=1) + "\n")


class Priced(Protocol):
    """A saving and its price."""

    @property
    def saved(self) -> float:
        """Share of all MLP FLOPs, 0 to 1."""

    @property
    def perplexity_ratio(self) -> float:
        """To the full model."""


P = TypeVar("P", bound=Priced)


def find_front(qualities: Sequence[P]) -> list[P]:
    """Return the Pareto front, by saving: those that no other beats in both saving and perplexity ratio."""
    front: list[P] = []
    for quality in sorted(qualities, key=lambda q: (-q.saved, q.perplexity_ratio)):
        if not front or quality.perplexity_ratio < front[-1].perplexity_ratio:
            front.append(quality)
    return front[::-1]


def draw(path: Path, points: Points, title: str) -> None:
    """Draw perplexity increase (log scale) against saved FLOPs, one line per mechanism."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for i, (mechanism, rows) in enumerate(points.items()):
        line = sorted((q.saved * 100, max(1e-3, q.perplexity_ratio * 100 - 100)) for _, q in rows)
        axes.plot(
            *zip(*line, strict=True), marker="os^vDPX*"[i % 8], markersize=4, linewidth=1.2, label=mechanism, color=pyplot.colormaps["tab20"](i % 20)
        )
    front = find_front([q for rows in points.values() for _, q in rows])
    axes.plot([q.saved * 100 for q in front], [max(1e-3, q.perplexity_ratio * 100 - 100) for q in front], "k--", linewidth=0.8, label="front")
    axes.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="MLP FLOPs saved, %", ylabel="perplexity increase, %", yscale="log", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
