"""What every test shares: no deadlines of hypothesis, because timings decide nothing, and one core for each process of pytest."""

from __future__ import annotations

import os

import hypothesis
import pytest

MAX_WORKERS = 4
"""more at once would each hold an engine, and memory for it"""

hypothesis.settings.register_profile("sedac", deadline=None)
hypothesis.settings.load_profile("sedac")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many processes `--numprocesses auto` means: one for each core."""
    return min(len(os.sched_getaffinity(0)), MAX_WORKERS)


def _take_core() -> None:
    """Keep to one core, in the process of a worker: its engines' threads would wait for each other where those of two share a core."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker and int(os.environ["PYTEST_XDIST_WORKER_COUNT"]) > 1:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


_take_core()
