"""Measures the same rows with the engine in process, without a server: tokens per second alone, each row and round in a child of its own.

One child runs at a time, so that none is frozen. `engine.py` is what it runs.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import sedac_demo

from sedac.bench.cells import Cells
from sedac.bench.matrix import DEFAULT_TIER, Load, Matrix, Model, Row
from sedac.bench.plans import Plan, find_directory, find_draft, make_environment
from sedac.bench.prompts import Prompts, make_starts
from sedac.bench.rounds import order_round
from sedac.bench.servers import Server, Servers
from sedac.bench.stage import Step
from sedac.errors import BenchmarkFailed, ConfigError

_CHILD_SECONDS = 1800.0


def adapt(matrix: Matrix) -> Matrix:
    """Return what of a matrix can be measured in process: no rates, nothing of a server, no quality.

    Raises:
        ConfigError: nothing of it can.
    """
    if not matrix.concurrencies:
        raise ConfigError(f"matrix {matrix.name!r} has request_rates alone, which only a server has; give concurrencies, or leave --offline out")
    return matrix.model_copy(update={"request_rates": (), "quality": None, "idle_seconds": 0.0, "warmup_rounds": 0, "seconds": 0.0})


def list_children(matrix: Matrix, model: Model, cells: Cells) -> list[tuple[int, Row]]:
    """Return rounds and rows that have a load to measure, in the order in which their children run."""
    done, names = cells.get_done(), [load.name for load in matrix.loads]
    order = [
        (number, row)
        for number in range(matrix.rounds)
        for _, row in order_round(matrix.get_rows(model), [Load(concurrency=1)], number, matrix.seed)
    ]  # fmt: skip
    return [(number, row) for number, row in order if any((model.name, row.name, name, number) not in done for name in names)]


def run_model(matrix: Matrix, model: Model, cells: Cells, servers: Servers, step: Step) -> None:
    """Measure what is missing of a model.

    Raises:
        BenchmarkFailed: a child failed.
    """
    prompts = Prompts(matrix.prompts, find_directory(model), seed=matrix.seed)
    sizes = [load.concurrency * matrix.requests for load in matrix.loads]
    starts = make_starts(sizes, matrix.rounds)
    for number, row in list_children(matrix, model, cells):
        step(f"{model.name}: round {number + 1} of {matrix.rounds}, {row.name}")
        directory = servers.make_directory(row.name)
        waves = {
            load.name: _cut(prompts.take(size, matrix.prompt_tokens, start), load.concurrency)
            for load, size, start in zip(matrix.loads, sizes, starts[number], strict=True)
        }
        order = {**make_order(matrix, model, row), "waves": waves, "num_tokens": matrix.output_tokens, "temperature": matrix.temperature}
        found = _run_child(matrix, row, order, directory, servers)
        for name, figures in found.items():
            cells.add("cell", model=model.name, row=row.name, load=name, round=number, figures=figures)


def _cut(prompts: list[list[int]], size: int) -> list[list[list[int]]]:
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]


def make_order(matrix: Matrix, model: Model, row: Row) -> dict[str, Any]:
    """Return what a child needs to know of its engine."""
    flags = ["--model", str(find_directory(model)), "--max-model-len", str(model.max_model_len), *matrix.flags, *row.system.flags]
    if row.system.kind == "plain":
        return {"flags": flags, "probe_set": None, "draft": None, "tier": DEFAULT_TIER, "knobs": {}}
    draft = find_draft(model, row.system)
    return {
        "flags": flags,
        "probe_set": str((model.probe_set or sedac_demo.DIRECTORY / "probe-set").resolve()),
        "draft": str(draft.resolve()) if draft else None,
        "tier": row.tier.name,
        "knobs": row.tier.knobs,
    }


def _run_child(matrix: Matrix, row: Row, order: dict[str, Any], directory: Path, servers: Servers) -> dict[str, dict[str, float]]:
    task, answer = directory / "order.json", directory / "answer.json"
    task.write_text(json.dumps(order), encoding="utf-8")
    environment = make_environment(matrix, row.system)
    if row.system.kind == "sedac":
        environment["VLLM_PLUGINS"] = "sedac"
    command = (sys.executable, "-m", "sedac.bench.engine", str(task), str(answer))
    child: Server = servers.launch(Plan(name=row.name, command=command, environment=environment))
    began = time.monotonic()
    while child.process.poll() is None:
        if time.monotonic() - began > _CHILD_SECONDS:
            raise BenchmarkFailed(f"the engine of {row.name!r} was not done after {_CHILD_SECONDS:.0f} s; its log is {child.log}")
        time.sleep(0.2)
    if child.process.returncode or not answer.exists():
        child.check()
    servers.forget(child)
    found: dict[str, dict[str, float]] = json.loads(answer.read_text(encoding="utf-8"))
    return found
