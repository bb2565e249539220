"""The tables of these benchmarks: a header, one line per row while they run, and the files at the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def format_header(columns: Sequence[str]) -> str:
    """Return the table's first two lines."""
    return "| " + " | ".join(columns) + " |\n|" + "---|" * len(columns)


def format_row(columns: Sequence[str], row: dict[str, Any]) -> str:
    """Return one line of the table."""

    def show(column: str) -> str:
        value = row.get(column)
        if value is None:
            return "-"
        return f"{value:.1e}" if column == "error" else f"{value:.4g}" if isinstance(value, float) else str(value)

    return "| " + " | ".join(show(column) for column in columns) + " |"


def write(out: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]], **more: Any) -> None:
    """Write OUT.md and OUT.json, which also has `more`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text("\n".join([format_header(columns), *(format_row(columns, row) for row in rows)]) + "\n")
    out.with_suffix(".json").write_text(json.dumps({"rows": rows, **more}, indent=1) + "\n")
