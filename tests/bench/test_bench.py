"""`sedac bench` as a user calls it; the thorough part on real servers of the demo model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from sedac.app.cli import app
from typer.testing import CliRunner

TINY = """
name: tiny
flags: [--enforce-eager]
systems:
  - {name: plain, kind: plain}
  - {name: sedac, kind: sedac, tiers: [exact, default, {disabled: true}]}
concurrencies: [1, 2]
output_tokens: 24
requests: 1
rounds: 1
warmup_rounds: 0
idle_seconds: 1
quality: {requests: 2, output_tokens: 16, texts: 1, text_tokens: 64}
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "sedac.app.cli", "bench", *arguments], capture_output=True, text=True, timeout=800, check=False)


def test_show_prints_a_matrix_with_all_its_fields():
    shown = CliRunner().invoke(app, ["bench", "quick", "--show", "--rounds", "5", "--concurrency", "2"])
    assert shown.exit_code == 0
    assert "rounds: 5\n" in shown.output
    assert "concurrencies:\n- 2\n" in shown.output
    assert "output_tokens:" in shown.output


def test_the_help_teaches_with_examples():
    shown = CliRunner().invoke(app, ["bench", "--help"], terminal_width=200)
    assert [w for w in ("sedac bench serving --out", "--only-report", "--offline", "quick") if w not in shown.output] == []


def test_an_error_is_one_line_that_names_its_remedy(tmp_path):
    done = run(str(tmp_path / "none.yaml"))
    assert done.returncode == 1
    assert done.stderr.startswith("sedac: matrix '")
    assert "one of quick, serving" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_report_without_a_figure_is_written_too(tmp_path):
    done = run("quick", "--only-report", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.timeout(2400)
@pytest.mark.e2e
@pytest.mark.thorough
def test_a_tiny_matrix_from_servers_to_the_page(tmp_path):
    matrix, out = tmp_path / "tiny.yaml", tmp_path / "out"
    matrix.write_text(TINY)
    done = run(str(matrix), "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((out / "results.json").read_text())
    (model,) = results["models"]
    assert [row["name"] for row in model["rows"]] == ["plain", "sedac, exact", "sedac, default", "sedac, disabled"]
    for row in model["rows"]:
        for load in row["loads"]:
            assert load["ratio"]["median"] > 0
            assert load["figures"]["num_tokens"]["median"] == 24 * int(load["load"].split()[1])
    plain, exact, default, disabled = model["rows"]
    for row in (plain, exact, disabled):
        assert row["quality"]["perplexity_ratio"] == pytest.approx(1.0, abs=1e-3)
    assert default["quality"]["perplexity_ratio"] != 1.0, "the text was read under the tier"
    assert default["loads"][0]["figures"]["work_saved"]["median"] > 0.05
    assert exact["loads"][0]["figures"]["work_saved"]["median"] == disabled["loads"][0]["figures"]["work_saved"]["median"] == 0
    assert all(system["memory_bytes"] > 2**28 and system["ready_seconds"] > 1 for system in model["systems"])
    assert {"report.md", "report.html", "speed.png", "cells.jsonl"} <= {file.name for file in out.iterdir()}
    again = run(str(matrix), "--out", str(out))
    assert again.returncode == 0, again.stderr
    assert "starting" not in again.stdout, "nothing is missing, so nothing is started"
    refused = run(str(matrix), "--out", str(out), "--rounds", "2")
    assert refused.returncode == 1
    assert "holds figures of matrix 'tiny'" in refused.stderr


@pytest.mark.timeout(2400)
@pytest.mark.e2e
@pytest.mark.thorough
def test_an_interrupt_stops_every_server_and_a_rerun_goes_on(tmp_path):
    matrix, out = tmp_path / "tiny.yaml", tmp_path / "out"
    matrix.write_text(TINY.replace("[exact, default, {disabled: true}]", "[exact]").replace("idle_seconds: 1", "idle_seconds: 0"))
    command = [sys.executable, "-m", "sedac.app.cli", "bench", str(matrix), "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as bench:
        deadline, cells = time.monotonic() + 600, out / "cells.jsonl"
        while not (cells.exists() and '"kind": "cell"' in cells.read_text()):
            assert bench.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        family = psutil.Process(bench.pid).children(recursive=True)
        assert len(family) > 4
        os.kill(bench.pid, signal.SIGINT)
        bench.wait(120)
    assert [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE] == []
    kept = cells.read_text()
    done = run(str(matrix), "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert cells.read_text().startswith(kept)
    assert json.loads((out / "results.json").read_text())["sessions"] == 2


@pytest.mark.timeout(2400)
@pytest.mark.e2e
@pytest.mark.thorough
def test_the_same_rows_in_process(tmp_path):
    matrix, out = tmp_path / "tiny.yaml", tmp_path / "out"
    matrix.write_text(TINY.replace("[exact, default, {disabled: true}]", "[default]"))
    done = run(str(matrix), "--offline", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    (model,) = json.loads((out / "results.json").read_text())["models"]
    assert all(load["ratio"]["median"] > 0 for row in model["rows"] for load in row["loads"])
    assert [row["name"] for row in model["rows"]] == ["plain", "sedac, default"]
    assert json.loads((out / "results.json").read_text())["mode"] == "offline"
