"""What benchmarks/cuda/engine.py makes of its rows: comparisons of answers, the speed table, and the files."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine_variants import PLAIN_V1, PLAIN_V2, VARIANTS

START = ("engine", "ready seconds", "start seconds", "runner", "cudagraph_mode", "if_nodes", "async", "GiB", "vllm", "torch", "device")
EXACT = ("engine", "asked", "against", "batch", "answers", "tokens", "equal tokens", "equal answers", "largest difference")
TIERS = ("tier", "batch", "mlp_share", "equal tokens")
SPEED = ("batch", "variant", "rounds", "ms", "tokens/s", "to plain V2", "to plain V1", "mlp_share")


def compare(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compare answers to the same prompts.

    `equal tokens` is the share of positions with the same token; `largest difference` is of log-probabilities (nats), over the positions
    whose whole answer so far is the same; `first difference` is the earliest position at which any answer differs, None: nowhere.
    """
    num_tokens, num_equal, largest, firsts = 0, 0, 0.0, []
    for mine, other in zip(ours, theirs, strict=True):
        same = [a == b for a, b in zip(mine["tokens"], other["tokens"], strict=True)]
        first = same.index(False) if False in same else len(same)
        num_tokens, num_equal = num_tokens + len(same), num_equal + sum(same)
        if first < len(same):
            firsts.append(first)
        pairs = zip(mine["logprobs"][:first], other["logprobs"][:first], strict=True)
        largest = max([largest, *(abs(a - b) for a, b in pairs)])
    return {
        "answers": len(ours), "tokens": num_tokens, "equal tokens": num_equal / num_tokens, "equal answers": len(ours) - len(firsts),
        "first difference": min(firsts, default=None), "largest difference": largest,
    }  # fmt: skip


def summarise(waves: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the speed table: a row for each batch size and variant, each figure [min, median, max] over its rounds.

    A ratio is of tokens per second, over 1 is faster, and of two waves of the same phase and round.
    """
    plain = {(w["engine"], w["phase"], w["round"], w["batch"]): w["tokens/s"] for w in waves if w["engine"] in (PLAIN_V1, PLAIN_V2)}
    groups: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for wave in waves:
        groups[wave["batch"], wave["variant"]].append(wave)
    names = [v.name for v in VARIANTS]
    rows = []
    for (batch, variant), found in sorted(groups.items(), key=lambda item: (item[0][0], names.index(item[0][1]))):
        row: dict[str, Any] = {"batch": batch, "variant": variant, "rounds": len(found)}
        row |= {key: _spread([w[key] for w in found]) for key in ("ms", "tokens/s")}
        for title, engine in (("to plain V2", PLAIN_V2), ("to plain V1", PLAIN_V1)):
            others = [(w, plain.get((engine, w["phase"], w["round"], batch))) for w in found]
            row[title] = _spread([w["tokens/s"] / other for w, other in others if other])
        shares = [w["mlp_share"] for w in found if w["mlp_share"] is not None]
        row["mlp_share"] = statistics.median(shares) if shares else None
        rows.append(row)
    return rows


def _spread(values: Sequence[float]) -> list[float] | None:
    return [min(values), statistics.median(values), max(values)] if values else None


def format_row(columns: Sequence[str], row: dict[str, Any]) -> str:
    """Return one line of a table; of three values the median with min and max behind it."""

    def show(value: Any) -> str:
        if isinstance(value, list):
            low, median, high = (f"{v:.4g}" for v in value)
            return f"{median} ({low}-{high})"
        return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    return "| " + " | ".join(show(row.get(column)) for column in columns) + " |"


def format_table(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table."""
    return "\n".join(["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *(format_row(columns, row) for row in rows)]) + "\n"


def write(out: Path, rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> str:
    """Write OUT/engine.json and OUT/engine.md of all rows so far; returns the latter's text."""
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        kinds[row["kind"]].append(row)
    table = summarise(kinds["speed"])
    lines = [f"# vLLM with and without SEDAC\n\n{about['device']}; {about['ended']} after {about['seconds']:.0f} s of {about['budget']:.0f}."]
    if about["is_dry_run"]:
        lines.append("A dry run with tiny shapes: it shows that everything runs, and its times mean nothing.")
    lines.append("## Engines\n\n" + format_table(START, kinds["start"]))
    lines.append("## Exactness: the demo model, greedy, bfloat16\n\n" + format_table(EXACT, kinds["exact"]))
    lines.append("Tiers: share of the MLPs that generated tokens were computed with, and tokens equal to plain V1's.\n")
    lines.append(format_table(TIERS, kinds["tier"]))
    lines.append("## Speed: decode steps of the 7B-shaped dummy\n\nMedians over rounds (min-max); ratios of tokens per second, over 1 is faster.\n")
    lines.append(format_table(SPEED, table))
    lines += [f"Failed: {row['engine']}, {row['what']}: {row['reason']}\n" for row in kinds["fault"]]
    lines += [f"Not measured: {what}\n" for what in about["left"]]
    text = "\n".join(lines)
    (out / "engine.md").write_text(text)
    (out / "engine.json").write_text(json.dumps({"about": about, "speed": table, "rows": list(rows)}, indent=1) + "\n")
    return text
