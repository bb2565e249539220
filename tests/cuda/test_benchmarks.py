"""The benchmarks' own checks, without a GPU: the same cases and code as on one, on tiny shapes; timing says what it needs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from tests.cuda.test_interpreted import REPOSITORY, make_environment


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = make_environment()
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, f"benchmarks/cuda/{script}.py", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)


def test_every_case_of_the_kernels_is_checked(tmp_path):
    done = run("kernels", "--check", "--tokens", "5", "--swaps", "20", "--out", str(tmp_path / "kernels"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "kernels.json").read_text())
    seen = {(row["dtype"], row["form"]) for row in found["rows"] if "form" in row}
    assert seen == {(f"torch.{dtype}", form) for dtype in ("float32", "float16", "bfloat16") for form in ("few", "middle", "many")}
    assert all(row["error"] < 1e-2 for row in found["rows"])
    assert found["swaps"] == {"swaps": 20, "mixed": 0, "late": 0, "moved": 0}


def test_every_plan_of_the_step_is_checked():
    done = run("step", "--check")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("| tiny |") == 28


@pytest.mark.parametrize("script", ["kernels", "step"])
def test_timing_without_a_gpu_says_what_it_needs(script):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    done = run(script)
    assert done.returncode != 0
    assert "--check" in done.stderr
    assert "12.4" in done.stderr
