"""Measures a matrix over HTTP: starts the servers of a model, warms them up, and measures the cells that are missing, round by round.

While one server is measured all others are frozen, so that each has the machine for itself and all are measured within the same minutes.
"""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterable

from sedac.bench import quality
from sedac.bench.cells import Cells, Key
from sedac.bench.figures import measure_counters, measure_streams, read_counters
from sedac.bench.load import Ask, count_prompts, run_load
from sedac.bench.matrix import Load, Matrix, Model, Row
from sedac.bench.prompts import make_starts
from sedac.bench.rounds import order_round
from sedac.bench.servers import Server
from sedac.bench.stage import Stage
from sedac.errors import BenchmarkFailed

RATE_SECONDS = 10.0
_COUNT_SECONDS = 1.2
"""Seconds after which SEDAC's counters hold what was done: it reads them from the engine every 0.5 s."""


def run_model(stage: Stage) -> None:
    """Measure what is missing of a model; starts nothing where nothing is.

    Raises:
        BenchmarkFailed: a server ended or refused a request; those that still run are stopped by whoever opened the stage's servers.
    """
    matrix, model, cells = stage.matrix, stage.model, stage.cells
    if not list_missing(matrix, model, cells):
        return
    try:
        _run(stage)
    except (BenchmarkFailed, OSError):
        for server in stage.servers.get_all():
            server.check()  # where a server ended, its log says more than a connection that broke
        raise


def _run(stage: Stage) -> None:
    matrix, model, cells = stage.matrix, stage.model, stage.cells
    stage.start()
    done = cells.get_done()
    first = 0 if is_measured(matrix, model, cells) else -matrix.warmup_rounds
    for number in range(first, matrix.rounds):
        for place, row in order_round(stage.rows, matrix.loads, number + matrix.warmup_rounds, matrix.seed):
            if number < 0 or (model.name, row.name, matrix.loads[place].name, number) not in done:
                _measure(stage, row, place, number)
    if matrix.quality:
        quality.measure(stage, matrix.quality)
    stage.measure_memory()


def _measure(stage: Stage, row: Row, place: int, number: int) -> None:
    """Measure one cell; a negative number is a round that warms up and counts nowhere."""
    matrix, load = stage.matrix, stage.matrix.loads[place]
    what = "warming up" if number < 0 else f"round {number + 1} of {matrix.rounds}"
    stage.step(f"{stage.model.name}: {what}, {load.name}, {row.name}")
    server = stage.prepare(row)
    before = _read_counters(server, row)
    sizes = [count_prompts(load, matrix.requests, get_seconds(matrix, load)) for load in matrix.loads]
    start = make_starts(sizes, matrix.rounds + matrix.warmup_rounds)[number + matrix.warmup_rounds][place]
    ask = Ask(
        url=server.url,
        tier=row.tier.name,
        num_tokens=matrix.output_tokens,
        temperature=matrix.temperature,
        seed=1000 * (number + matrix.warmup_rounds),
        salt=f"{row.name} {number} {load.name}",
    )
    streams = run_load(
        ask,
        load,
        stage.prompts.take(sizes[place], matrix.prompt_tokens, start),
        per_client=matrix.requests,
        seconds=get_seconds(matrix, load),
        seed=matrix.seed + 1009 * place + 1009**2 * number,
    )
    if number >= 0:
        figures = {**measure_streams(streams), **measure_counters(before, _read_counters(server, row))}
        stage.cells.add("cell", model=stage.model.name, row=row.name, load=load.name, round=number, figures=figures)


def get_seconds(matrix: Matrix, load: Load) -> float:
    """Return for how long a cell begins new requests. 0 where their number decides."""
    return matrix.seconds or (RATE_SECONDS if load.rate else 0.0)


def _read_counters(server: Server, row: Row) -> dict[str, float]:
    if row.system.kind == "sedac":
        time.sleep(_COUNT_SECONDS)
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as answer:
        return read_counters(answer.read().decode())


def list_missing(matrix: Matrix, model: Model, cells: Cells) -> list[Key]:
    """Return the cells of a model that are not measured yet; the quality of a row is a cell of the load `quality`."""
    done = cells.get_done() | {(model.name, line["row"], "quality", 0) for line in cells.get_all("quality", model=model.name)}
    names, loads = [row.name for row in matrix.get_rows(model)], [load.name for load in matrix.loads]
    keys = [(model.name, name, load, number) for number in range(matrix.rounds) for load in loads for name in names]
    keys += [(model.name, name, "quality", 0) for name in names if matrix.quality]
    return [key for key in keys if key not in done]


def is_measured(matrix: Matrix, model: Model, cells: Cells) -> bool:
    """Whether all rounds of a model are done, and at most its quality is missing."""
    return all(load == "quality" for _, _, load, _ in list_missing(matrix, model, cells))


def count_steps(matrix: Matrix, models: Iterable[Model], cells: Cells) -> int:
    """Return how many steps of progress a run will take."""
    total = 0
    for model in models:
        if missing := list_missing(matrix, model, cells):
            systems = matrix.get_systems(model)
            idle = [s for s in systems if matrix.idle_seconds and not cells.get_all("idle", model=model.name, system=s.name)]
            warmup = 0 if is_measured(matrix, model, cells) else matrix.warmup_rounds
            total += len(missing) + len(systems) + len(idle) + warmup * len(matrix.get_rows(model)) * len(matrix.loads)
    return total
