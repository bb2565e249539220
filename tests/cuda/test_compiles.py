"""Every launch of the engine at the shapes of a 7B model becomes machine code for sm_90, without a GPU and without spilling."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.cuda.test_interpreted import REPOSITORY, make_environment

KERNELS = {
    "begin_kernel", "end_kernel", "checkpoint_kernel", "gate_up_kernel", "down_kernel", "activation_kernel", "finish_kernel", "merge_kernel",
    "compact_kernel", "grouped_gate_up_kernel", "grouped_down_kernel",
}  # fmt: skip
MAX_STACK = 64
"""bytes; spills take more"""
MAX_SHARED = 227 * 1024
"""bytes that a block of an H100 or H200 may ask for"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "tests/cuda/compiling.py", "--quick"]
    environment = make_environment(TRITON_CACHE_DIR=cache)
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_is_built(built):
    assert {kernel["kernel"] for kernel in built} == KERNELS
    assert all(kernel["bytes"] > 0 for kernel in built)


def test_none_spills_or_asks_for_too_much(built):
    for kernel in built:
        assert kernel["stack"] <= MAX_STACK, kernel
        assert kernel["registers"] <= 255, kernel
        assert kernel["shared"] <= MAX_SHARED, kernel
