"""Every launch of the engine at the shapes of a 7B model becomes machine code for sm_90, without a GPU and without spilling."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.cuda.environment import REPOSITORY, make_environment

KERNELS = {
    "begin_kernel", "end_kernel", "checkpoint_kernel", "gate_up_kernel", "down_kernel", "activation_kernel", "finish_kernel", "merge_kernel",
    "compact_kernel", "grouped_gate_up_kernel", "grouped_down_kernel",
}  # fmt: skip
FEW = {"begin_kernel", "end_kernel", "checkpoint_kernel", "gate_up_kernel", "down_kernel", "activation_kernel", "merge_kernel"}
"""those that a step of few rows launches"""
MAX_STACK = 64
"""bytes; spills take more"""
MAX_SHARED = 227 * 1024
"""bytes that a block of an H100 or H200 may ask for"""


@pytest.fixture(scope="module", params=["one", pytest.param("bf16", marks=pytest.mark.thorough)])
def built(request, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "tests/cuda/compiling.py", f"--{request.param}"]
    environment = make_environment(TRITON_CACHE_DIR=cache)
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-4000:]
    return request.param, [json.loads(line) for line in done.stdout.splitlines()]


def test_kernels_are_built(built):
    which, kernels = built
    assert {kernel["kernel"] for kernel in kernels} == (FEW if which == "one" else KERNELS)
    assert all(kernel["bytes"] > 0 for kernel in kernels)


def test_none_spills_or_asks_for_too_much(built):
    for kernel in built[1]:
        assert kernel["stack"] <= MAX_STACK, kernel
        assert kernel["registers"] <= 255, kernel
        assert kernel["shared"] <= MAX_SHARED, kernel
