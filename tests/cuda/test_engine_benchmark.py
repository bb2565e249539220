"""benchmarks/cuda/engine.py without a GPU: a dry run of real engines, interrupted near its end; what it does with engines that die or hang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.cuda.environment import REPOSITORY, make_environment

sys.path.insert(0, str(REPOSITORY / "benchmarks" / "cuda"))
import engine_process
import engine_report
import engine_variants as variants

ENGINES = (variants.SEDAC, variants.PLAIN_V2, variants.PLAIN_V1, variants.DEMO_SEDAC, variants.DEMO_V1)
LAST = "batch 128, phase 3"


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """Run until the last phase has begun, then interrupt; the folder, the printed lines and how long the end took."""
    out = tmp_path_factory.mktemp("engine")
    command = [sys.executable, "-u", "benchmarks/cuda/engine.py", "--out", str(out), "--dry-run", "--rounds", "1", "--seconds", "700", "--engines"]
    environment = make_environment()
    environment.pop("TRITON_INTERPRET", None)
    lines, interrupted = [], 0.0
    with subprocess.Popen(
        [*command, *ENGINES], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:  # fmt: skip
        for line in process.stdout:
            lines.append(line)
            if LAST in line and not interrupted:
                interrupted = time.monotonic()
                process.send_signal(signal.SIGINT)
    assert process.returncode == 1, "an engine can't start here, and the status says so" + "".join(lines)[-4000:]
    assert interrupted, "".join(lines)[-4000:]
    return out, lines, time.monotonic() - interrupted


@pytest.fixture(scope="module")
def rows(dry_run):
    return [json.loads(line) for line in (dry_run[0] / "engine.jsonl").read_text().splitlines()]


@pytest.mark.thorough
@pytest.mark.engine
def test_an_interrupt_ends_it_soon_and_leaves_the_files(dry_run, rows):
    out, lines, seconds = dry_run
    assert seconds < 30
    whole = json.loads((out / "engine.json").read_text())
    assert whole["about"]["ended"] == "ended by SIGINT"
    assert whole["rows"] == rows
    assert "checkpoints decide, nothing exits, batch 128" in whole["about"]["left"]
    assert not any(name.endswith("batch 16") for name in whole["about"]["left"])
    text = (out / "engine.md").read_text()
    assert text in "".join(lines)
    assert "skip from 50 % of the depth" in text
    for name in ENGINES:
        assert (out / "logs" / f"{engine_process.make_slug(name)}.log").exists()


@pytest.mark.thorough
@pytest.mark.engine
def test_engines_start_and_one_that_can_not_is_passed_over(rows):
    started = {row["engine"]: row for row in rows if row["kind"] == "start"}
    assert set(started) == set(ENGINES) - {variants.PLAIN_V2}
    assert all(row["runner"] == "V1" for row in started.values())
    (fault,) = [row for row in rows if row["kind"] == "fault"]
    assert fault["engine"] == variants.PLAIN_V2
    assert "Model Runner V2 requires Triton" in fault["reason"]


@pytest.mark.thorough
@pytest.mark.engine
def test_answers_are_compared(rows):
    exact = {(row["engine"], row["asked"], row["batch"]): row for row in rows if row["kind"] == "exact"}
    assert {batch for _, _, batch in exact} == {1, 4, 16}
    for asked in ("policy disabled", "tier exact"):
        row = exact[variants.DEMO_SEDAC, asked, 1]
        assert (row["equal tokens"], row["answers"], row["tokens"]) == (1.0, 4, 32)
        assert row["largest difference"] == 0.0
    shares = {row["tier"]: row["mlp_share"] for row in rows if row["kind"] == "tier" and row["batch"] == 1}
    assert shares["exact"] == 1.0
    assert shares["skip"] == pytest.approx(3 / 12), "every token skips the layers above the first checkpoint, after the third of 12 layers"
    assert 1 > shares["conservative"] > shares["balanced"] > shares["aggressive"]


@pytest.mark.thorough
@pytest.mark.engine
def test_speed_rows_come_in_order_and_are_what_they_say(rows):
    speed = [row for row in rows if row["kind"] == "speed"]
    there = tuple(name for name in ENGINES if name != variants.PLAIN_V2)
    wanted = [(w.variant.name, w.batch, w.phase) for w in variants.make_waves(1, there)]
    seen = [(row["variant"], row["batch"], row["phase"]) for row in speed]
    assert seen == wanted[: len(seen)]
    assert wanted[len(seen) - 1][2] == 3
    assert all(row["ms"] > 0 and row["tokens"] == row["steps"] * row["batch"] for row in speed if row["batch"] < 128)
    share = {row["variant"]: row["mlp_share"] for row in speed if row["batch"] == 1}
    assert share["plain, Model Runner V1"] is None
    for name, expected in (("attached, policy disabled", 1), ("tier exact", 1), ("checkpoints decide, nothing exits", 1), ("width 50 %", 0.5)):
        assert share[name] == pytest.approx(expected), name
    for percent in (25, 50, 75):
        assert share[f"skip from {percent} % of the depth"] == pytest.approx(percent / 100)
    assert share["contextual 50 %"] == pytest.approx(2 / 3, abs=0.05), "thresholds came from gates measured in the engine"


@pytest.mark.thorough
@pytest.mark.engine
def test_thresholds_come_from_measured_gates_with_the_forms_of_a_gpu(tmp_path):
    environment = make_environment()
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "tests/cuda/engine_calibration_job.py", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads((tmp_path / "answers.json").read_text())
    assert found["before"] == pytest.approx(1 / 3, abs=0.01), "no neuron's gate is over the set's own threshold: the gates alone are computed"
    assert found["after"] == pytest.approx(2 / 3, abs=0.05)
    assert all(0 < threshold < 1 for threshold in found["thresholds"])


def test_ratios_compare_rounds_of_one_phase():
    def make(engine, variant, number, rate):
        return {"engine": engine, "variant": variant, "batch": 1, "phase": 0, "round": number, "ms": 1.0, "tokens/s": rate, "mlp_share": None}

    plain, ours = variants.VARIANTS[0], variants.VARIANTS[2]
    waves = [make(plain.engine, plain.name, i, rate) for i, rate in enumerate((100.0, 50.0, 200.0))]
    waves += [make(ours.engine, ours.name, i, rate) for i, rate in enumerate((110.0, 60.0, 180.0))]
    rows = engine_report.summarise(waves)
    assert rows[1]["to plain V2"] == pytest.approx([0.9, 1.1, 1.2])
    assert rows[1]["to plain V1"] is None


def test_differences_count_up_to_where_answers_part():
    found = engine_report.compare(
        [{"tokens": [1, 2, 3, 4], "logprobs": [-0.1, -0.2, -5, -1]}, {"tokens": [7, 7], "logprobs": [-1, -1]}],
        [{"tokens": [1, 2, 9, 4], "logprobs": [-0.1, -0.25, -1, -1]}, {"tokens": [7, 7], "logprobs": [-1, -1.01]}],
    )
    assert (found["tokens"], found["equal tokens"], found["equal answers"], found["first difference"]) == (6, 5 / 6, 1, 2)
    assert found["largest difference"] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import sys\nprint('{}', flush=True)\nsys.stdin.readline()\nsys.exit('the card fell off')", "ended with 1.*the card fell off"),
        (
            "import faulthandler, signal, time\nfaulthandler.register(signal.SIGUSR1)\nprint('{}', flush=True)\ntime.sleep(600)",
            "no answer within 1 s",
        ),
        ("import sys\nprint('{}', flush=True)\nfor _ in sys.stdin: print('{\"error\": \"CUDA error\"}', flush=True)", "3 errors in a row, .*CUDA"),
    ],
    ids=["dies", "hangs", "fails"],
)
def test_an_engine_that_fails_is_asked_nothing_more(tmp_path, code, reason):
    script = tmp_path / "child.py"
    script.write_text(code)
    process = engine_process.EngineProcess("an engine", {}, dict(os.environ), work=tmp_path, logs=tmp_path / "logs", script=script)
    assert process.wait_ready(30)
    for _ in range(3):
        with pytest.raises(engine_process.EngineFault):
            process.ask(1, do="measure")
    assert not process.is_alive
    with pytest.raises(engine_process.EngineFault, match=reason):
        process.ask(1, do="measure")
    assert process._process.poll() is not None, "it was ended"
    if "hangs" in reason or "no answer" in reason:
        assert "child.py" in process.log_path.read_text(), "its stacks are in its log"
