"""The kernels' tests under Triton's interpreter, in processes of their own: it must be chosen before Triton is imported."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda.environment import REPOSITORY, make_environment

FILES = sorted(path.name for path in (Path(__file__).parent / "interpreted").glob("test_*.py"))


WIDE = ("test_decide.py", "test_mlp.py")
"""those with thorough cases"""


@pytest.mark.parametrize(
    ("file", "chosen"), [*((file, "not thorough") for file in FILES), *(pytest.param(f, "thorough", marks=pytest.mark.thorough) for f in WIDE)]
)
def test_kernels_under_the_interpreter(file, chosen):
    options = ["-q", "--override-ini", "addopts=--import-mode=importlib", "-p", "no:cacheprovider", "-m", chosen]  # in this one process
    command = [sys.executable, "-m", "pytest", *options, f"tests/cuda/interpreted/{file}"]
    done = subprocess.run(command, cwd=REPOSITORY, env=make_environment(TRITON_INTERPRET="1"), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\b[1-9]\d* passed", done.stdout), done.stdout[-2000:]
    assert "skipped" not in done.stdout
