"""The benchmarks' own checks, without a GPU: the same rows and code as on one, on tiny shapes; what fails or is cut short leaves the rest."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.cuda.environment import REPOSITORY, make_environment

BENCHMARKS = REPOSITORY / "benchmarks" / "cuda"
ENDINGS = """
import os, time

def run_row(spec, context):
    if spec["swaps"] == 1:
        raise ValueError("the row's own")
    if spec["swaps"] == 2:
        os.abort()
    if spec["swaps"] == 3:
        time.sleep(600)
    return {"late": os.getpid()}
"""
CHILD = """
import sys
sys.path[:0] = {paths}
import child
child.PARTS["swaps"] = "endings"
child.main()
"""


def make_command(script: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    environment = make_environment()
    for name in ("TRITON_INTERPRET", "PYTHONPATH"):  # the scripts find the package by their own path
        environment.pop(name, None)
    return [sys.executable, f"benchmarks/cuda/{script}.py", *arguments], environment


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command, environment = make_command(script, *arguments)
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("forms", [("few",), pytest.param(("few", "middle", "many"), marks=pytest.mark.thorough)], ids="-".join)
def test_every_case_of_the_kernels_is_checked(tmp_path, forms):
    chosen = ("--form", *forms) if len(forms) == 1 else ()
    done = run("kernels", "--check", "--tokens", "5", "--swaps", "10", "--out", str(tmp_path / "kernels"), *chosen)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert found["rows"] == read_lines(tmp_path / "kernels.jsonl")
    kernels = [row for row in found["rows"] if row["part"] == "kernels"]
    seen = {(row["dtype"], row["form"], row["case"]) for row in kernels}
    assert len(seen) == len(kernels) == 3 * len(forms) * 11
    assert {row["dtype"] for row in kernels} == {"float32", "float16", "bfloat16"}
    assert {row["form"] for row in kernels} == set(forms)
    assert all(row["error"] < 1e-2 for row in kernels)
    swaps = found["rows"][-1]
    assert [swaps[name] for name in ("swaps", "mixed", "late", "moved")] == [10, 0, 0, 0]


@pytest.mark.parametrize(("plan", "num_rows"), [("50 %", 8), pytest.param("", 28, marks=pytest.mark.thorough)], ids=["half", "all"])
def test_every_plan_of_the_step_is_checked(plan, num_rows):
    done = run("step", "--check", "--plan", plan)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("| tiny |") == num_rows


def test_a_dry_run_of_the_card_names_what_its_time_left_out(tmp_path):
    done = run("card", "--check", "--seconds", "5", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "card.json").read_text())
    rows, left_out = found["rows"], found["left_out"]
    assert rows == read_lines(tmp_path / "card.jsonl")
    assert [row["part"] for row in rows[:2]] == ["card", "nodes"]
    assert all(row["replays"] > 10 for row in rows if row["part"] == "captured")
    assert found["card"]["torch"] == torch.__version__
    assert not found["interrupted"]
    assert left_out, "the interpreter takes longer than 5 s for all"
    assert f"{len(left_out)} left out" in done.stdout
    assert done.stdout.count("\n  left out: ") == len(left_out)
    parts = [row["part"] for row in (*rows, *left_out)]
    assert {"captured", "captured checkpoints", "kernels", "probe", "step", "swaps"} <= set(parts)
    assert "## left out" in (tmp_path / "card.md").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.thorough)])
def test_an_interrupted_run_leaves_its_rows(tmp_path, number):
    command, environment = make_command("card", "--check", "--out", str(tmp_path))
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True)
    lines, end = tmp_path / "card.jsonl", time.monotonic() + 200
    while not (lines.exists() and len(read_lines(lines)) >= 2):  # the third runs
        assert time.monotonic() < end, "no row came"
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    found = json.loads((tmp_path / "card.json").read_text())
    assert found["interrupted"]
    assert [row["part"] for row in found["rows"][:2]] == ["card", "nodes"]
    assert found["rows"] == read_lines(lines)
    assert f"interrupted by {number.name}" in output
    assert "swaps" in {row["part"] for row in found["left_out"]}


@pytest.fixture
def make_runner(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from runner import Runner

    (tmp_path / "endings.py").write_text(ENDINGS)
    (tmp_path / "child_of_a_test.py").write_text(CHILD.format(paths=[str(tmp_path), str(BENCHMARKS)]))
    command = [sys.executable, str(tmp_path / "child_of_a_test.py")]
    return lambda **more: Runner(tmp_path / "out", is_check=False, command=command, **more)


def test_a_row_that_fails_crashes_or_hangs_is_told_and_passed_over(make_runner, tmp_path, capsys):
    specs = [{"part": "swaps", "swaps": kind, "tokens": number} for number, kind in enumerate([0, 1, 0, 2, 0, 3, 0])]
    with make_runner(row_seconds=5) as runner:
        assert runner.run(specs) == []
        assert runner.finish([]) == 1
    rows = read_lines(tmp_path / "out.jsonl")
    assert [row["tokens"] for row in rows] == list(range(7))
    assert rows[1]["failed"] == "ValueError: the row's own"
    assert "SIGABRT" in rows[3]["failed"]
    assert rows[5]["failed"] == "took longer than 5 s"
    processes = [rows[i]["late"] for i in (0, 2, 4, 6)]
    assert processes[0] == processes[1], "an error costs no process"
    assert len(set(processes)) == 3, "a crash and a hang cost one each"
    assert json.loads((tmp_path / "out.json").read_text())["failed"] == 3
    assert "failed: swaps, 3 tokens, 2: " in capsys.readouterr().out


def test_rows_like_those_that_took_the_process_along_are_not_begun(make_runner, tmp_path):
    specs = [{"part": "swaps", "swaps": kind, "tokens": tokens} for kind, tokens in ((2, 5), (2, 5), (0, 5), (0, 6))]
    with make_runner() as runner:
        runner.run(specs)
    failed = [row.get("failed", "") for row in read_lines(tmp_path / "out.jsonl")]
    assert failed[2].startswith("not begun: 2 rows like it")
    assert failed[3] == ""


def test_without_time_nothing_is_begun(make_runner):
    specs = [{"part": "swaps", "swaps": 0}] * 2
    with make_runner(seconds=0) as runner:
        assert runner.run(specs) == specs
        assert runner.finish(specs) == 0
    assert runner.rows == []


@pytest.mark.parametrize("script", ["kernels", "step", "card"])
def test_timing_without_a_gpu_says_what_it_needs(script):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    done = run(script)
    assert done.returncode != 0
    assert "--check" in done.stderr
    assert "12.4" in done.stderr


WITHOUT_PYDANTIC = """
import importlib.util, runpy, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "pydantic" else find_spec(name)
sys.path.insert(0, "benchmarks/cuda")
sys.argv = ["benchmarks/cuda/card.py", "--check"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_package_that_is_missing_is_named_with_the_remedy():
    _, environment = make_command("card")
    done = subprocess.run([sys.executable, "-c", WITHOUT_PYDANTIC], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "this Python lacks pydantic; carry what is missing and put its folder on PYTHONPATH" in done.stderr
