"""The picture of a report: how fast each row is, beside plain vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sedac.bench.extras import need
from sedac.bench.matrix import PLAIN

_FASTER, _SAME, _SLOWER = "#2e9e4f", "#8a949e", "#d64550"
_NEAR = 0.02


def _choose_colour(ratio: float) -> str:
    return _FASTER if ratio > 1 + _NEAR else _SAME if ratio >= 1 - _NEAR else _SLOWER


def draw_speed(results: dict[str, Any], path: Path) -> None:
    """Draw a bar per row and load: median of tokens per second against plain vLLM, least and most over rounds as whiskers.

    Raises:
        ConfigError: matplotlib is missing.
    """
    need("matplotlib").use("Agg")
    pyplot = need("matplotlib.pyplot")
    models, loads = results["models"], results["loads"]
    num_rows = max(len(model["rows"]) for model in models)
    size = (1.9 + 3.4 * len(loads), 1.3 + (0.9 + 0.42 * num_rows) * len(models))
    figure, axes = pyplot.subplots(len(models), len(loads), figsize=size, layout="constrained", squeeze=False, sharex=True)
    for line, model in zip(axes, models, strict=True):
        rows = [row for row in model["rows"] if row["name"] != PLAIN]
        for place, (axis, load) in enumerate(zip(line, loads, strict=True)):
            _draw_panel(axis, rows, place)
            axis.set_title(f"{model['name']}, {load}" if len(models) > 1 else load, fontsize=10)
            axis.set_yticks(range(len(rows)), [row["name"] for row in rows] if place == 0 else [""] * len(rows), fontsize=9)
            axis.set_ylim(len(rows) - 0.4, -0.6)
    for axis in axes[-1]:
        axis.set_xlim(0, max(1.25, axis.get_xlim()[1]))
        axis.set_xlabel("times the speed of plain vLLM", fontsize=9)
    title = f"{results['name']}: output tokens per second, plain vLLM = 1"
    figure.suptitle(f"{title}\ngreen: faster, grey: within 2 %, red: slower; lines: least and most over rounds", fontsize=11)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_panel(axis: Any, rows: list[dict[str, Any]], place: int) -> None:
    for number, row in enumerate(rows):
        ratio = row["loads"][place]["ratio"]
        if ratio is None:
            continue
        median = ratio["median"]
        axis.barh(number, median, height=0.62, color=_choose_colour(median), alpha=0.85)
        axis.plot([ratio["min"], ratio["max"]], [number, number], color="#222222", linewidth=1.3, marker="|", markersize=6)
        axis.text(max(median, ratio["max"]) + 0.02, number, f"{median:.2f}", va="center", fontsize=9)
    axis.axvline(1.0, color="#222222", linewidth=1.2, linestyle="--")
    axis.grid(alpha=0.25, axis="x")
    axis.set_axisbelow(True)
    axis.margins(x=0.12)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
