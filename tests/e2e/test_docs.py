"""The pages' blocks that need a serving engine, run as they stand, in order, against one `sedac serve`; tests/docs/cover.py says which."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from testing.served import Served, find_free_port, start, stop
from tests.docs.cover import ENGINE, check_output, find_blocks
from tests.docs.pages import ROOT

pytestmark = pytest.mark.e2e


def _make_programs(directory: Path) -> None:
    """Make `.venv/bin` in a directory, with the programs that the pages call."""
    folder = directory / ".venv" / "bin"
    folder.mkdir(parents=True)
    for name, call in (("sedac", " -m sedac.app.cli"), ("python", "")):
        (folder / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)}{call} "$@"\n')
        (folder / name).chmod(0o755)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory like a checkout after `make setup`, as far as the blocks need it."""
    directory = tmp_path_factory.mktemp("checkout")
    _make_programs(directory)
    (directory / "probes").symlink_to(ROOT / "probes")
    return directory


@pytest.fixture(scope="module")
def metrics_port() -> int:
    return find_free_port()


@pytest.fixture(scope="module")
def documented(tmp_path_factory, metrics_port) -> Iterator[Served]:
    running = start(tmp_path_factory.mktemp("serve"), SEDAC_CONTROL_METRICS_PORT=str(metrics_port))
    yield running
    assert stop(running) == 0, running.log.read_text()[-4000:]


@pytest.mark.parametrize("block", find_blocks(ENGINE), ids=str)
def test_the_block_runs(documented, place, metrics_port, block):
    text = block.text.replace("localhost:8000", f"127.0.0.1:{documented.port}").replace("localhost:9464", f"127.0.0.1:{metrics_port}")
    command = [".venv/bin/python", "-c", text] if block.language == "python" else ["bash", "-euo", "pipefail", "-c", text]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SEDAC_")}
    path = f"{place / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    variables = {**clean, "PATH": path, "COLUMNS": "250", "SEDAC_CONTROL_ADDRESS": documented.control_address}
    done = subprocess.run(command, cwd=place, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
    check_output(block, done.stdout + done.stderr)
