"""What every test shares: no deadlines of hypothesis, because timings decide nothing; one core for each process of pytest; and one folder.

`make test` must end soon, so tests that need the same thing that is slow to start run in one process, and what takes longest runs first.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import hypothesis
import pytest
from xdist.scheduler import LoadFileScheduling

from testing.shared import FOLDER

MAX_WORKERS = 4
"""more at once would each hold an engine, and memory for it"""

GROUPS = {
    "tests/e2e/test_audit.py": "served",
    "tests/e2e/test_guard.py": "served",
    "tests/e2e/test_serve.py": "served",
}
"""files that share what they start (a fixture of the package), by the group that one process runs; any other file is its own group"""

LONGEST = ("served",)
"""groups and files that run before all others, else one process would still run when the others have nothing left"""

pytest.register_assert_rewrite("tests.cuda.interpreted.cases", "tests.engine.level_steps")
hypothesis.settings.register_profile("sedac", deadline=None)
hypothesis.settings.load_profile("sedac")


def get_group(nodeid: str) -> str:
    """What a test must share a process with."""
    file = nodeid.partition("::")[0]
    return GROUPS.get(file, file)


class GroupScheduling(LoadFileScheduling):  # type: ignore[misc]
    """Give a process of pytest-xdist one group after the other."""

    def _split_scope(self, nodeid: str) -> str:
        return get_group(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> GroupScheduling | None:
    return GroupScheduling(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep groups together, the longest first."""
    groups = [get_group(item.nodeid) for item in items]
    order = {group: number for number, group in enumerate([*LONGEST, *dict.fromkeys(groups)][::-1])}
    ranks = {item: -order[group] for item, group in zip(items, groups, strict=True)}
    items.sort(key=ranks.__getitem__)


def pytest_configure(config: pytest.Config) -> None:
    if FOLDER not in os.environ:
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="sedac-tests-")
        config.add_cleanup(_remove_folder)


def _remove_folder() -> None:
    shutil.rmtree(Path(os.environ.pop(FOLDER)), ignore_errors=True)


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
