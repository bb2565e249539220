"""What benchmarks/speculation.py makes of its measurements: figures per setting, the cost model beside them, a table and a picture."""

from __future__ import annotations

import json
import statistics
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

WINDOW_TOKENS, WINDOW_EVERY = 500, 50
KEY = ("model", "temperature", "context", "batch", "variant")

Steps = list[tuple[float, int]]
"""seconds and tokens of each step"""


def get_steps(run: dict[str, Any]) -> Steps:
    """Return the steps of a run's waves, one after the other."""
    return [step for wave in run["waves"] for step in zip(wave["seconds"], wave["num_tokens"], strict=True)]


def get_rate(run: dict[str, Any]) -> float:
    """Return tokens per second."""
    steps = get_steps(run)
    return sum(n for _, n in steps) / sum(s for s, _ in steps)


def find_lowest_window(own: Steps, plain: Steps) -> float | None:
    """Return the lowest ratio of plain's time to the variant's over any 500 tokens, the same ones of both; None: too few tokens."""

    def times(steps: Steps) -> tuple[list[float], list[int]]:
        return [0.0, *accumulate(s for s, _ in steps)], [0, *accumulate(n for _, n in steps)]

    def at(clock: tuple[list[float], list[int]], token: int) -> float:
        seconds, tokens = clock
        i = max(1, bisect_left(tokens, token))
        return seconds[i - 1] + (seconds[i] - seconds[i - 1]) * (token - tokens[i - 1]) / (tokens[i] - tokens[i - 1])

    clocks = times(own), times(plain)
    last = min(clock[1][-1] for clock in clocks) - WINDOW_TOKENS
    ratios = [
        (at(clocks[1], t + WINDOW_TOKENS) - at(clocks[1], t)) / (at(clocks[0], t + WINDOW_TOKENS) - at(clocks[0], t))
        for t in range(0, last, WINDOW_EVERY)
    ]
    return min(ratios, default=None)


def interpolate(points: dict[int, float], x: float) -> float:
    """Read a measured curve between its points; beyond them, along its last piece."""
    xs = sorted(points)
    i = min(max(1, bisect_left(xs, x)), len(xs) - 1)
    low, high = xs[i - 1], xs[i]
    return points[low] + (points[high] - points[low]) * (x - low) / (high - low)


def predict(batch: int, tokens_per_turn: float, passes: float, rows: float, costs: dict[str, Any]) -> float:
    """Return tau T1 / (k d + V(n) + o): the ratio to plain decoding that separately measured costs promise.

    `costs`: `steps`, plain vLLM's step (seconds) by number of sequences, which is both T1 and V; `passes`, a draft pass by batch size;
    `overhead`, what a step without drafts takes longer in the drafting engine. `rows`: verified per step, all sequences together.
    """
    plain = interpolate(costs["steps"], batch)
    return tokens_per_turn * plain / (passes * costs["passes"][batch] + interpolate(costs["steps"], rows) + costs["overhead"][batch])


def make_record(batch: int, runs: list[dict[str, Any]], plain: list[dict[str, Any]], costs: dict[str, Any] | None) -> dict[str, Any]:
    """Return the figures of a variant in one setting from its rounds and plain vLLM's."""
    ratios = [get_rate(own) / get_rate(other) for own, other in zip(runs, plain, strict=True)]
    steps = [step for run in runs for step in get_steps(run)]
    turns = sum(wave["num_turns"] for run in runs for wave in run["waves"])
    tokens = sum(n for _, n in steps)
    drafted, accepted = (sum(run["drafts"].get(name, 0) for run in runs) for name in ("draft_tokens", "accepted_tokens"))
    answers = [[answer for run in some for wave in run["waves"] for answer in wave["answers"]] for some in (runs, plain)]
    pairs = [(a, b) for own, other in zip(*answers, strict=True) for a, b in zip(own, other, strict=False)]
    record: dict[str, Any] = {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "tokens_per_second": statistics.median(get_rate(run) for run in runs),
        "acceptance": accepted / drafted if drafted else None,
        "token_ratio": accepted / tokens,
        "tokens_per_turn": tokens / turns,
        "draft_length": drafted / turns,
        "lowest_window": find_lowest_window(steps, [step for run in plain for step in get_steps(run)]),
        "same_tokens": sum(a == b for a, b in pairs) / len(pairs),
        "states": [c["state"] + (f" {c['gain']:.2f}" if c["gain"] else "") for c in runs[-1].get("controller", ()) if c["num_sequences"] == batch],
    }
    if "own" in runs[0]:
        own = {name: sum(run["own"][name] for run in runs) for name in runs[0]["own"]}
        record["draft_share"] = own["draft_seconds"] / own["step_seconds"] if own["step_seconds"] else 0.0
        if costs:
            passes = own["num_passes"] / len(steps)
            record["predicted"] = predict(batch, tokens / turns, passes, batch * (1 + drafted / turns), costs)
    return record


def merge(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return all records, new ones in the place of old ones of the same setting and variant."""
    found = {tuple(r[k] for k in KEY): r for r in [*old, *new]}
    return list(found.values())


def _show(value: Any, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def print_table(records: Sequence[dict[str, Any]]) -> None:
    """Print one row per setting and variant."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="tokens per second, plain vLLM of the same round = 1.00", box=None)
    for name in (
        *KEY,
        "ratio",
        "spread",
        "lowest 500",
        "predicted",
        "of it",
        "AR",
        "TRR",
        "tokens/step",
        "drafts/step",
        "draft time",
        "same",
        "controller",
    ):
        table.add_column(name, justify="left" if name in ("model", "variant", "controller") else "right")
    setting: tuple[Any, ...] = ()
    for r in records:
        if setting and setting != tuple(r[k] for k in KEY[:-1]):
            table.add_section()
        setting = tuple(r[k] for k in KEY[:-1])
        predicted = r.get("predicted")
        spread = f"{min(r['ratios']):.2f}..{max(r['ratios']):.2f}"
        table.add_row(
            *(str(r[k]) for k in KEY), f"{r['ratio']:.3f}", spread, _show(r["lowest_window"]), _show(predicted, ".3f"),
            _show(r["ratio"] / predicted if predicted else None), _show(r["acceptance"]), _show(r["token_ratio"]), _show(r["tokens_per_turn"]),
            _show(r["draft_length"]), _show(r.get("draft_share"), ".0%"), _show(r["same_tokens"], ".0%"), ", ".join(r["states"]),
        )  # fmt: skip
    Console(width=190).print(table)


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the ratio to plain by variant, one panel per model and batch size, one mark per temperature and context."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models, batches = (sorted({r[k] for r in records}) for k in ("model", "batch"))
    variants = list(dict.fromkeys(r["variant"] for r in records))
    figure, axes = plt.subplots(
        len(models),
        len(batches),
        figsize=(5 * len(batches), 0.32 * len(variants) * len(models) + 1.6),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    kinds = sorted({(r["temperature"], r["context"]) for r in records})
    for row, model in zip(axes, models, strict=True):
        for ax, batch in zip(row, batches, strict=True):
            for number, (temperature, context) in enumerate(kinds):
                some = [r for r in records if (r["model"], r["batch"], r["temperature"], r["context"]) == (model, batch, temperature, context)]
                places = [variants.index(r["variant"]) + 0.15 * (number - len(kinds) / 2) for r in some]
                label = f"{'greedy' if temperature == 0 else f'T = {temperature}'}, {context} context"
                ax.plot([r["ratio"] for r in some], places, "o", markersize=4, color=f"C{number}", label=label)
                told = [(r["predicted"], y) for r, y in zip(some, places, strict=True) if r.get("predicted")]
                ax.plot([x for x, _ in told], [y for _, y in told], "|", markersize=8, color=f"C{number}")
            ax.axvline(1, color="grey", linewidth=0.8)
            ax.set(title=f"{model}, batch {batch}", yticks=range(len(variants)), yticklabels=variants)
            ax.grid(alpha=0.3, axis="x")
    axes[0][0].invert_yaxis()
    for ax in axes[-1]:
        ax.set_xlabel("tokens per second against plain vLLM; | cost model")
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def save(path: Path, records: list[dict[str, Any]], engines: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Merge into NAME.json, draw NAME.png; returns all records and engines."""
    file = path.with_suffix(".json")
    old = json.loads(file.read_text()) if file.exists() else {"records": [], "engines": {}}
    records = merge(old["records"], records)
    order = {name: i for i, name in enumerate(dict.fromkeys(r["variant"] for r in records))}
    records.sort(key=lambda r: (r["model"], r["temperature"], r["context"] != "short", r["batch"], order[r["variant"]]))
    engines = {name: {**old["engines"].get(name, {}), **found} for name, found in engines.items()} | {
        k: v for k, v in old["engines"].items() if k not in engines
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"records": records, "engines": engines}, indent=1) + "\n")
    plot(records, path.with_suffix(".png"))
    return records, engines
