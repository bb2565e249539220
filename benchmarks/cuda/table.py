"""The tables of these benchmarks: which columns a part has, one line per row while they run, and the files at the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS: dict[str, tuple[str, ...]] = {
    "card": ("gpu", "driver", "cuda", "torch", "triton", "bytes per second", "flops per second"),
    "nodes": ("if nodes", "source"),
    "captured": ("shape", "dtype", "tokens", "form", "weights", "replays", "error"),
    "captured checkpoints": ("shape", "dtype", "tokens", "replays", "error"),
    "kernels": (
        "shape", "dtype", "tokens", "case", "form", "error", "dense us", "ours us", "ours min us", "ours max us", "ideal us", "ours / dense",
        "reached",
    ),
    "probe": ("shape", "dtype", "tokens", "error", "ours us", "ours min us", "ours max us"),
    "step": ("shape", "tokens", "cache", "plan", "error", "dense us", "ours us", "ours min us", "ours max us", "speed-up", "bound"),
    "swaps": ("swaps", "mixed", "late", "moved"),
}  # fmt: skip
"""Columns by part. A row that failed says so in place of its figures."""


def format_header(columns: Sequence[str]) -> str:
    """Return the table's first two lines."""
    return "| " + " | ".join(columns) + " |\n|" + "---|" * len(columns)


def format_row(columns: Sequence[str], row: dict[str, Any]) -> str:
    """Return one line of the table."""

    def show(column: str) -> str:
        value = row.get(column)
        if value is None:
            return "failed" if column == "error" and "failed" in row else "-"
        return f"{value:.1e}" if column == "error" else f"{value:.4g}" if isinstance(value, float) else str(value)

    return "| " + " | ".join(show(column) for column in columns) + " |"


def describe(row: dict[str, Any]) -> str:
    """Return what row it is, in a few words."""
    names = ("part", "shape", "dtype", "tokens", "cache", "form", "weights", "case", "plan", "swaps")
    return ", ".join(f"{row[name]} tokens" if name == "tokens" else str(row[name]) for name in names if row.get(name) is not None)


def write(out: Path, rows: Sequence[dict[str, Any]], **more: Any) -> None:
    """Write OUT.md, a table per part and what failed, and OUT.json, which has `more` beside the rows and the card on top."""
    out.parent.mkdir(parents=True, exist_ok=True)
    card = next((row for row in rows if row["part"] == "card"), None)
    parts = dict.fromkeys(row["part"] for row in rows)
    how = "inside CUDA graphs" if more.get("captures") else "launched eagerly, the host's own time among what was measured"
    text = (
        [f"{card['gpu']}, driver {card['driver']}, CUDA {card['cuda']}, torch {card['torch']}, Triton {card['triton']}; {how}."]
        if card and card.get("gpu")
        else []
    )
    for part in parts:
        mine = [format_row(COLUMNS[part], row) for row in rows if row["part"] == part]
        text.append(f"## {part}\n\n" + "\n".join([format_header(COLUMNS[part]), *mine]))
    failed = [f"- {describe(row)}: {row['failed']}" for row in rows if "failed" in row]
    left_out = [f"- {describe(spec)}" for spec in more.get("left_out", ())]
    text += [f"## {title}\n\n" + "\n".join(lines) for title, lines in (("failed", failed), ("left out", left_out)) if lines]
    out.with_suffix(".md").write_text("\n\n".join(text) + "\n")
    out.with_suffix(".json").write_text(json.dumps({"card": card, **more, "rows": list(rows)}, indent=1) + "\n")
