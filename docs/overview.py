"""Draw docs/overview.svg: the way of a token and the way of a knob (`python docs/overview.py [OUT]`, `make docs`).

Text is drawn as outlines and the ids are fixed, so that the picture is the same everywhere and a test can draw it again and compare.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams.update({"svg.hashsalt": "sedac", "svg.fonttype": "path", "font.family": "DejaVu Sans"})

from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch  # noqa: E402

TOKEN, KNOB, NUMBER, QUIET, PAPER = "#1f5fa8", "#b4511d", "#3d7a35", "#5b6470", "#ffffff"


def draw_box(
    axes: Axes, x: float, y: float, width: float, height: float, title: str, text: str = "", *, colour: str = QUIET, fill: str = PAPER
) -> None:
    """Draw a rounded box with a bold title and, under it, a few lines of text; x and y are its lower left corner."""
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=1.2", facecolor=fill, edgecolor=colour, linewidth=1.3))
    lines = text.count("\n") + 1 if text else 0
    middle = y + height / 2
    axes.text(x + width / 2, middle + 1.35 * lines, title, ha="center", va="center", fontsize=9.5, fontweight="bold", color="#1d232a")
    if text:
        axes.text(x + width / 2, middle - 1.5, text, ha="center", va="center", fontsize=8, color="#1d232a", linespacing=1.35)


def draw_arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, *, bend: float = 0.0) -> None:
    """Draw an arrow between two points."""
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, linewidth=1.8, color=colour, connectionstyle=style, shrinkA=0, shrinkB=0)
    )


def say(axes: Axes, x: float, y: float, text: str, colour: str, **knobs: str) -> None:
    """Write a note beside an arrow."""
    axes.text(x, y, text, fontsize=8, color=colour, va="center", linespacing=1.3, **{"ha": "center", **knobs})


def draw(out: Path) -> None:
    """Write the picture as SVG."""
    figure = Figure(figsize=(11.2, 6.6), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 168)
    axes.set_ylim(0, 99)
    axes.axis("off")

    axes.add_patch(FancyBboxPatch((33, 25), 100, 70, boxstyle="round,pad=0,rounding_size=1.5", facecolor="#f4f7fb", edgecolor="#c3cfdd", linewidth=1))
    axes.text(35, 91.5, "engine: vLLM with SEDAC attached", fontsize=9, color=QUIET, va="center", fontweight="bold")

    draw_box(axes, 3, 60, 20, 13, "client", "OpenAI API", colour=TOKEN)
    draw_box(axes, 37, 58, 24, 17, "agent", "fixes the request's tier;\nhands policies on", colour=TOKEN)
    draw_arrow(axes, (23, 69), (37, 69), TOKEN)
    say(axes, 28.7, 72, "request", TOKEN)

    x, width = 72, 56
    axes.text(x + width / 2, 88.2, "one forward pass, layer by layer", fontsize=8, color=QUIET, ha="center", va="center")
    draw_box(axes, x, 76, width, 9.5, "lower layers", "attention always; MLP at the tier's floor", colour=TOKEN)
    draw_box(axes, x, 62, width, 9.5, "checkpoint", "probe reads the residual stream: risk below the threshold?", colour=KNOB, fill="#fdf3ec")
    draw_box(axes, x, 45, 26, 12, "confident", "attention always;\nMLP at the tier's level", colour=TOKEN)
    draw_box(axes, x + 30, 45, 26, 12, "not confident", "attention always;\nMLP at the tier's floor", colour=TOKEN)
    draw_box(axes, x, 31.5, width, 8.5, "next token", "sampled by vLLM", colour=TOKEN)
    draw_arrow(axes, (61, 69), (72, 80), TOKEN)
    draw_arrow(axes, (x + 28, 76), (x + 28, 71.5), TOKEN)
    draw_arrow(axes, (x + 20, 62), (x + 13, 57), TOKEN)
    draw_arrow(axes, (x + 36, 62), (x + 43, 57), TOKEN)
    say(axes, x + 12, 59.8, "yes", TOKEN)
    say(axes, x + 44, 59.8, "no", TOKEN)
    draw_arrow(axes, (x + 13, 45), (x + 13, 40), TOKEN)
    draw_arrow(axes, (x + 43, 45), (x + 43, 40), TOKEN)
    draw_arrow(axes, (72, 35), (13, 60), TOKEN, bend=-0.22)
    say(axes, 65, 32, "token", TOKEN)

    draw_box(axes, 3, 5, 20, 13, "operator", "sedac ctl, Python,\ngrpcurl", colour=KNOB)
    draw_box(axes, 37, 4, 33, 15, "control service", "checks the change, keeps it as\na revision, writes the audit log", colour=KNOB)
    draw_arrow(axes, (23, 11.5), (37, 11.5), KNOB)
    say(axes, 29.7, 14.5, "a knob", KNOB)
    draw_arrow(axes, (45, 19), (45, 58), KNOB)
    draw_arrow(axes, (53, 58), (53, 19), KNOB)
    say(axes, 44, 28.5, "policy", KNOB, ha="right")
    say(axes, 54.2, 28.5, "yes or no", KNOB, ha="left")
    draw_arrow(axes, (61, 64.5), (72, 66.5), KNOB)
    say(axes, 66.6, 61.4, "between\ntwo passes", KNOB)

    draw_box(axes, 79, 4, 22, 15, "/metrics", "vllm:* and sedac_*", colour=NUMBER)
    draw_box(axes, 111, 4, 22, 15, "Prometheus", "alerts", colour=NUMBER)
    draw_box(axes, 143, 4, 22, 15, "Grafana", "dashboard", colour=NUMBER)
    draw_arrow(axes, (90, 25), (90, 19), NUMBER)
    say(axes, 92, 22, "counters", NUMBER, ha="left")
    draw_arrow(axes, (101, 11.5), (111, 11.5), NUMBER)
    draw_arrow(axes, (133, 11.5), (143, 11.5), NUMBER)

    for row, (colour, text) in enumerate(((TOKEN, "the way of a token"), (KNOB, "the way of a knob"), (NUMBER, "the way of a number"))):
        axes.plot((137, 142), (90 - 5 * row,) * 2, color=colour, linewidth=2.4)
        axes.text(144, 90 - 5 * row, text, fontsize=8.5, color="#1d232a", va="center")
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Title": "The way of a token and of a knob through SEDAC"})


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg"))
