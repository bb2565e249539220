"""Where figures go: tables on the terminal and benchmarks/results/control.json."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.control.traffic import find_percentile

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
console = Console()
Seed = Annotated[int, typer.Option(help="Of the random choices: who crashes, which window comes first.")]


def save(part: str, figures: dict[str, Any]) -> None:
    """Write a part's figures beside those of the other parts."""
    path = RESULTS / "control.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[part] = {"machine": f"{platform.machine()}, {psutil.cpu_count()} cores", **figures}
    path.write_text(json.dumps(known, indent=2) + "\n")
    console.print(f"written: {path.relative_to(ROOT)}, part {part!r}")


def show(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Print a table."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column.replace("_", " "), justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row))
    console.print(table)


def summarize(values: list[float]) -> dict[str, float]:
    """Return the median, the 99th percentile and the largest of some seconds."""
    return {name: round(find_percentile(values, share), 4) for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))}
