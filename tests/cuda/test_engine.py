"""Real vLLM with the GPU's forms, in place of a GPU the interpreter: the same answers, counts and reports as with the CPU's kernels."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.cuda.environment import REPOSITORY, make_environment

pytestmark = [pytest.mark.engine, pytest.mark.thorough]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    results = {}
    for kind in ("native", "device"):
        path = tmp_path_factory.mktemp("jobs") / f"{kind}.json"
        environment = make_environment()
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, "tests/cuda/engine_job.py", kind, str(path)]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=800)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
        results[kind] = json.loads(path.read_text())
    return results


def test_answers_are_the_same(found):
    assert found["device"]["tokens"] == found["native"]["tokens"]
    for ours, theirs in zip(found["device"]["logprobs"], found["native"]["logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=2e-3)


@pytest.mark.parametrize("what", ["answers", "reports", "checkpoints", "tiers", "steps"])
def test_counts_and_reports_are_the_same(found, what):
    assert found["device"][what] == found["native"][what]


def test_something_was_decided_and_saved(found):
    assert sum(c["num_exited"] for c in found["device"]["checkpoints"]) > 0
    assert 0 < found["device"]["saved"] <= found["native"]["saved"] * 1.001, "rows masked beside full ones save nothing"
    assert found["device"]["mlp_shares"][0] == 1.0, "exact"
    assert min(found["device"]["mlp_shares"]) < 0.95
