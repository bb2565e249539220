"""What `sedac serve` and `sedac doctor` refuse, before anything heavy starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.e2e


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SEDAC_")}
    return subprocess.run([sys.executable, "-m", "sedac.cli", *arguments], capture_output=True, text=True, timeout=120, env=clean | environment)


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["serve"], {"SEDAC_ADAPTIVE": "1"}, "SEDAC_ADAPTIVE needs SEDAC_EXIT_RATES"),
        (["serve"], {"SEDAC_PROBE_DIR": "/nowhere"}, "SEDAC probe set missing: /nowhere/manifest.json"),
        (["serve"], {"SEDAC_PROBE_LAYERS": "7"}, "SEDAC probe missing for layer 7"),
        (["serve", "some/model"], {}, "no probe set for model 'some/model'"),
        (["serve", "--worker-cls", "x"], {}, "--worker-cls is set by `sedac serve` itself"),
        (["serve"], {"SEDAC_CONTROL_HOST": "0.0.0.0"}, "SEDAC_CONTROL_HOST=0.0.0.0 is not loopback and there is no TLS"),
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
    findings.pop("levels")  # absent where the probe set has hard exits only
    assert {name: f["state"] for name, f in findings.items()} == {
        "vLLM": "ok", "plugin sedac": "ok", "plugin sedac_agent": "ok", "settings": "ok", "architecture": "ok", "probe set": "ok",
        "tiers": "ok", "running engine": "absent",
    }  # fmt: skip


def test_doctor_says_why_not(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    done = _run("doctor", str(tmp_path), "--probe-set", str(tmp_path), "--json")
    states = {f["name"]: (f["state"], f["detail"]) for f in json.loads(done.stdout)}
    assert done.returncode == 1
    assert states["architecture"][0] == "bad"
    assert "serve it without SEDAC" in states["architecture"][1]
    assert states["probe set"][0] == "bad"
