"""What `sedac serve` and `sedac doctor` refuse, before anything heavy starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from testing.forked import run_python
from testing.other_vllm import lose, pretend_version

pytestmark = pytest.mark.e2e


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SEDAC_")}
    environment = clean | environment
    command = ["-m", "sedac.app.cli", *arguments]
    if "PYTHONPATH" in environment:  # what another vLLM is pretended by; a forked process has imported the one that is installed
        return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=600, env=environment)
    return run_python(*command, timeout=600, env=environment)


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["serve"], {"SEDAC_ADAPTIVE": "1"}, "SEDAC_ADAPTIVE needs SEDAC_EXIT_RATES"),
        (["serve"], {"SEDAC_PROBE_DIR": "/nowhere"}, "SEDAC probe set missing: /nowhere/manifest.json"),
        (["serve"], {"SEDAC_PROBE_LAYERS": "7"}, "SEDAC probe missing for layer 7"),
        (["serve", "some/model"], {}, "no probe set for model 'some/model'"),
        (["serve", "--worker-cls", "x"], {}, "--worker-cls is set by `sedac serve` itself"),
        (["serve"], {"SEDAC_CONTROL_HOST": "0.0.0.0"}, "SEDAC_CONTROL_HOST=0.0.0.0 is not loopback and there is no TLS"),
        (["serve", "--draft", "/nowhere"], {}, "draft missing: /nowhere/manifest.json; write it with `sedac-probes distill`"),
        (
            ["serve", "--draft", "/d", "--speculative-config", "{}"],
            {},
            "--speculative-config and --draft /d (SEDAC_DRAFT_DIR) are two ways to speculate",
        ),
        (["serve"], {"SEDAC_DRAFT_DIR": "none", "SEDAC_DRAFT_TOKENS": "4"}, "SEDAC_DRAFT_TOKENS is 4, but there is no draft"),
        (["serve", "--sedac-layer", "5", "--sedac-threshold", "-1"], {}, r"checkpoints[0].threshold"),
    ],
)
def test_refusals_name_value_and_remedy(arguments, environment, message):
    done = _run(*arguments, **environment)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_finds_the_installation_whole():
    done = _run("doctor", "--json", "--url", "http://127.0.0.1:1")
    findings = {f["name"]: f for f in json.loads(done.stdout)}
    assert done.returncode == 0, done.stdout
    for name in ("levels", "draft", "native kernels", "preloaded"):  # absent where the probe set, the demo or the environment has none
        findings.pop(name)
    assert {name: f["state"] for name, f in findings.items()} == {
        "vLLM": "ok", "plugin sedac": "ok", "plugin sedac_agent": "ok", "device": "ok", "settings": "ok", "architecture": "ok", "probe set": "ok",
        "tiers": "ok", "running engine": "absent", "touches": "ok",
    }  # fmt: skip
    rows = findings["touches"]["touches"]
    assert {row["target"]: row["differs"] for row in rows if row["differs"]} == {}
    assert len(rows) > 60
    wrapped = next(row for row in rows if row["target"] == "vllm.v1.engine.input_processor:InputProcessor.process_inputs")
    assert wrapped == {
        "target": "vllm.v1.engine.input_processor:InputProcessor.process_inputs", "used_for": "wrapped: stamps every request with its promise",
        "used_by": "agent/frontend.py", "checked_in": "front end", "expects": ["(request_id, params)"], "differs": "",
    }  # fmt: skip


def test_doctor_says_which_draft_is_attached(tmp_path):
    draft = {"name": "mine", "kind": "exit-head", "model": "m", "hidden_size": 256, "num_layers": 12, "depth": 6, "intermediate_size": 8}
    (tmp_path / "manifest.json").write_text(json.dumps(draft | {"max_tokens": 3}))

    def find(*arguments: str, **environment: str) -> tuple[int, str, str]:
        done = _run("doctor", "--json", "--url", "http://127.0.0.1:1", *arguments, **environment)
        found = next(f for f in json.loads(done.stdout) if f["name"] == "draft")
        return done.returncode, found["state"], found["detail"]

    assert find("--draft", str(tmp_path)) == (0, "ok", "mine: exit-head, 6 of 12 layers, up to 3 tokens per step")
    off = find(SEDAC_DRAFT_DIR=str(tmp_path), SEDAC_DRAFT_TOKENS="2", SEDAC_SPECULATION="0")
    assert off == (0, "ok", "mine: exit-head, 6 of 12 layers, room for 2 tokens per step, off at first (SEDAC_SPECULATION=0)")
    assert find("--draft", "none") == (0, "absent", "none, so nothing is drafted; name one with --draft or SEDAC_DRAFT_DIR")
    (tmp_path / "manifest.json").write_text(json.dumps(draft | {"num_layers": 13}))
    code, state, detail = find("--draft", str(tmp_path))
    assert (code, state) == (1, "bad")
    assert "was made for hidden size 256 and 13 layers, the model has 256 and 12" in detail


def test_doctor_shows_what_differs_inside_vllm_after_all_else(tmp_path):
    target = "vllm.v1.sample.rejection_sampler:_expand"
    done = _run("doctor", "--url", "http://127.0.0.1:1", PYTHONPATH=str(lose(tmp_path / "other", target)), COLUMNS="300")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    (first,) = (i for i, line in enumerate(lines) if line.split()[1:3] == ["running", "engine"])
    (lost,) = (i for i, line in enumerate(lines) if target.removeprefix("vllm.") in line)
    assert first < lost
    assert lines[lost].split()[0] == "no"
    assert "is missing" in lines[lost]
    assert [line.split()[0] for line in lines[first + 2 : -1]].count("no") == 1
    assert lines[-1].startswith("no ")


def test_doctor_says_which_version_is_wrong(tmp_path):
    done = _run("doctor", "--json", "--url", "http://127.0.0.1:1", PYTHONPATH=str(pretend_version(tmp_path / "other")))
    found = {f["name"]: f for f in json.loads(done.stdout)}
    assert done.returncode == 1
    assert found["vLLM"]["state"] == "bad"
    assert found["vLLM"]["detail"].startswith("vLLM 0.33.0 is installed, SEDAC supports 0.32.x; install that")
    assert found["touches"]["state"] == "ok", "it is the same inside"


def test_doctor_says_why_not(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    done = _run("doctor", str(tmp_path), "--probe-set", str(tmp_path), "--json")
    states = {f["name"]: (f["state"], f["detail"]) for f in json.loads(done.stdout)}
    assert done.returncode == 1
    assert states["architecture"][0] == "bad"
    assert "serve it without SEDAC" in states["architecture"][1]
    assert states["probe set"][0] == "bad"
