"""The table of results: on the terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table


def show_ratio(spread: dict[str, float] | None) -> str:
    """Return a ratio as `0.98 (0.95..1.01)`: the median over rounds, and the least and most."""
    return "-" if spread is None else f"{spread['median']:.2f} ({spread['min']:.2f}..{spread['max']:.2f})"


def show_median(spread: dict[str, float] | None, form: str = ".1f") -> str:
    """Return a median, or - where there is none."""
    return "-" if spread is None else format(spread["median"], form)


def show_number(value: float | None, form: str) -> str:
    """Return a number, or - where there is none."""
    return "-" if value is None else format(value, form)


def list_speed_rows(results: dict[str, Any], model: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the table of speed, its columns first: tokens per second against plain vLLM's of the same round, by load."""
    yield ["row", *results["loads"]]
    for row in model["rows"]:
        yield [row["name"], *(show_ratio(load["ratio"]) for load in row["loads"])]


def list_latency_rows(model: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the table of all figures that a client sees, medians over rounds, its columns first."""
    yield ["row", "load", "tokens/s", "TTFT p50, ms", "TTFT p99", "ITL p50, ms", "ITL p99", "tokens/piece", "AR", "TRR", "MLP work saved"]
    for row in model["rows"]:
        for load in row["loads"]:
            get = load["figures"].get
            times = [show_median(get(name), ".1f") for name in ("tokens_per_second", "ttft_ms_p50", "ttft_ms_p99", "itl_ms_p50", "itl_ms_p99")]
            times.append(show_median(get("tokens_per_piece"), ".2f"))
            shares = [show_median(get(name), form) for name, form in (("acceptance_rate", ".2f"), ("token_ratio", ".2f"), ("work_saved", ".1%"))]
            yield [row["name"], load["load"], *times, *shares]


def list_quality_rows(model: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the table of quality, its columns first; nothing where it was not measured."""
    if any(row["quality"] for row in model["rows"]):
        yield ["row", "answers equal to plain's", "tokens before the first difference", "perplexity ratio"]
        for row in model["rows"]:
            found = row["quality"] or {}
            names = (("identical_answers", ".0%"), ("leading_tokens", ".1%"), ("perplexity_ratio", ".4f"))
            yield [row["name"], *(show_number(found.get(name), form) for name, form in names)]


def list_server_rows(model: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the table of servers, its columns first."""
    yield ["server", "ready after, s", "memory, GiB", "idle, cores"]
    for system in model["systems"]:
        memory = None if system["memory_bytes"] is None else system["memory_bytes"] / 2**30
        figures = (show_number(system["ready_seconds"], ".0f"), show_number(memory, ".2f"), show_number(system["idle_cpu"], ".2f"))
        yield [system["name"], *figures]


def list_tables(results: dict[str, Any]) -> Iterator[tuple[str, list[list[str]]]]:
    """Yield the tables of all models: a title, and rows of which the first names the columns."""
    for model in results["models"]:
        yield f"{model['name']}: tokens per second against plain vLLM, median (least..most) over rounds", list(list_speed_rows(results, model))
        yield f"{model['name']}: what a client sees, medians over rounds", list(list_latency_rows(model))
        quality = list(list_quality_rows(model))
        if quality:
            yield f"{model['name']}: quality beside plain vLLM", quality
        if any(system["ready_seconds"] is not None for system in model["systems"]):
            yield f"{model['name']}: servers", list(list_server_rows(model))


def make_table(title: str, rows: list[list[str]]) -> Table:
    """Return a table for the terminal."""
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if number == 0 or name == "load" else "right")
    for row in rows[1:]:
        table.add_row(*row)
    return table


def to_markdown(title: str, rows: list[list[str]]) -> str:
    """Return a table as Markdown under its title."""
    aligned = ["---" if number == 0 or name == "load" else "---:" for number, name in enumerate(rows[0])]
    lines = [f"| {' | '.join(cells)} |" for cells in (rows[0], aligned, *rows[1:])]
    return f"## {title}\n\n" + "\n".join(lines) + "\n"
