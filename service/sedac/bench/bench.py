"""One run of `sedac bench`: measures what is missing of a matrix under a progress bar, then writes table, picture and page."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sedac.bench import offline, online
from sedac.bench.cells import Cells
from sedac.bench.machine import describe_machine, read_versions
from sedac.bench.matrix import Matrix
from sedac.bench.report import show_tables, write_report
from sedac.bench.results import make_results
from sedac.bench.servers import Servers
from sedac.bench.stage import Stage, Step

ONLINE, OFFLINE = "online", "offline"
_FILE_WIDTH = 150
"""Characters of a line where the output goes to a file."""


def open_cells(matrix: Matrix, directory: Path, mode: str = ONLINE) -> Cells:
    """Open the figures in a folder, or begin them.

    Raises:
        ConfigError: the folder holds others.
    """
    header = {
        "name": matrix.name,
        "digest": matrix.get_digest(),
        "mode": mode,
        "versions": read_versions(),
        "machine": describe_machine({**os.environ, **matrix.environment}),
        "matrix": matrix.model_dump(mode="json"),
    }
    return Cells(directory, header)


def measure(matrix: Matrix, directory: Path, cells: Cells, console: Console) -> None:
    """Measure over HTTP what is missing.

    Raises:
        SedacError: a server ended or refused a request; all servers are stopped.
    """
    with _showing_progress(online.count_steps(matrix, matrix.models, cells), console) as step, _ending_on_sigterm():
        for model in matrix.models:
            with Servers(directory / "logs" / model.name) as servers:
                online.run_model(Stage(matrix=matrix, model=model, cells=cells, servers=servers, step=step))


def measure_offline(matrix: Matrix, directory: Path, cells: Cells, console: Console) -> None:
    """Measure in process what is missing.

    Raises:
        SedacError: an engine failed.
    """
    total = sum(len(offline.list_children(matrix, model, cells)) for model in matrix.models)
    with _showing_progress(total, console) as step, _ending_on_sigterm():
        for model in matrix.models:
            with Servers(directory / "logs" / model.name) as servers:
                offline.run_model(matrix, model, cells, servers, step)


@contextmanager
def _showing_progress(total: int, console: Console) -> Iterator[Step]:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)
        began = 0

        def step(what: str) -> None:
            """Show what is done next; what was shown before is done."""
            nonlocal began
            progress.update(task, completed=began, description=what)
            began += 1
            if not console.is_terminal:
                console.print(f"{began}/{total} {what}", highlight=False)

        yield step
        progress.update(task, completed=total, description="done")


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the run as Ctrl-C does, so that servers are stopped."""

    def end(number: int, frame: FrameType | None) -> None:
        """Leave every context on the way out."""
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(matrix: Matrix, directory: Path, *, mode: str = ONLINE, measures: bool = True) -> None:
    """Measure what is missing of a matrix, or nothing, and write the report into a folder.

    Raises:
        SedacError: what is wrong with the folder, the packages or a server, with the remedy.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    if mode == OFFLINE:
        matrix = offline.adapt(matrix)
    cells = open_cells(matrix, directory, mode)
    if measures:
        (measure if mode == ONLINE else measure_offline)(matrix, directory, cells, console)
    results = make_results(matrix, cells)
    show_tables(results, console)
    files = write_report(results, directory)
    console.print("written: " + ", ".join(map(str, files)), highlight=False, soft_wrap=True)
