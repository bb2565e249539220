"""From measured cells to the figures of every row beside those of plain vLLM; statistics over rounds, nothing about how they look."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from sedac.bench import quality
from sedac.bench.cells import Cells
from sedac.bench.matrix import PLAIN, Matrix, Model, Row

_FORMAT = "sedac-bench/1"


def summarise_rounds(values: Sequence[float | None]) -> dict[str, float] | None:
    """Return median, least, most and number of what the rounds measured; None where none did."""
    known = [value for value in values if value is not None and value == value]
    if not known:
        return None
    return {"median": statistics.median(known), "min": min(known), "max": max(known), "rounds": len(known)}


def pair_rounds(ours: dict[int, float], plain: dict[int, float]) -> dict[str, float] | None:
    """Return the spread of the ratios of two rows, each ratio of figures of the same round."""
    return summarise_rounds([ours[number] / plain[number] for number in sorted(ours.keys() & plain.keys())])


def make_results(matrix: Matrix, cells: Cells) -> dict[str, Any]:
    """Return everything that a report shows, as JSON can hold it."""
    header = {name: value for name, value in cells.header.items() if name != "kind"}
    models = [_summarise_model(matrix, model, cells) for model in matrix.models]
    return {"format": _FORMAT, **header, "loads": [load.name for load in matrix.loads], "sessions": _count_sessions(cells), "models": models}


def _count_sessions(cells: Cells) -> int:
    return len({line["session"] for line in cells.get_all("cell")})


def _summarise_model(matrix: Matrix, model: Model, cells: Cells) -> dict[str, Any]:
    kept = {line["row"]: line for line in cells.get_all("quality", model=model.name)}
    qualities = quality.summarise(kept)
    rows = [_summarise_row(matrix, model, row, cells) for row in matrix.get_rows(model)]
    for row in rows:
        row["quality"] = qualities.get(row["name"])
    systems = []
    for system in matrix.get_systems(model):
        mine = {"model": model.name, "system": system.name}
        starts = [line["ready_seconds"] for line in cells.get_all("start", **mine)]
        memory = [line["pss_bytes"] for line in cells.get_all("memory", **mine)]
        idle = [line["cpu_share"] for line in cells.get_all("idle", **mine)]
        systems.append(
            {
                "name": system.name,
                "kind": system.kind,
                "flags": list(system.flags),
                "ready_seconds": starts[0] if starts else None,
                "ready_again_seconds": statistics.median(starts[1:]) if starts[1:] else None,
                "memory_bytes": memory[-1] if memory else None,
                "idle_cpu": idle[-1] if idle else None,
            }
        )
    return {"name": model.name, "rows": rows, "systems": systems}


def _summarise_row(matrix: Matrix, model: Model, row: Row, cells: Cells) -> dict[str, Any]:
    loads = []
    for load in matrix.loads:
        ours = _get_rounds(cells, model, row.name, load.name)
        plain = _get_rounds(cells, model, PLAIN, load.name)
        names = dict.fromkeys(name for figures in ours.values() for name in figures)
        loads.append(
            {
                "load": load.name,
                "ratio": pair_rounds(_get_speeds(ours), _get_speeds(plain)),
                "ratios": [ours[n]["tokens_per_second"] / plain[n]["tokens_per_second"] for n in sorted(ours.keys() & plain.keys())],
                "figures": {name: summarise_rounds([figures.get(name) for figures in ours.values()]) for name in names},
            }
        )
    return {"name": row.name, "system": row.system.name, "tier": row.tier.name, "loads": loads}


def _get_rounds(cells: Cells, model: Model, row: str, load: str) -> dict[int, dict[str, Any]]:
    return {line["round"]: line["figures"] for line in cells.get_all("cell", model=model.name, row=row, load=load)}


def _get_speeds(rounds: dict[int, dict[str, Any]]) -> dict[int, float]:
    return {number: figures["tokens_per_second"] for number, figures in rounds.items()}
