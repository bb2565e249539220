"""Real servers in environments with another vLLM: plain vLLM starts and answers, `sedac serve` is refused by name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from openai import OpenAI

from testing.other_vllm import lose, make_environment, pretend_version
from testing.served import find_free_port

pytestmark = pytest.mark.e2e

MODEL = Path(__file__).resolve().parents[2] / "probes" / "sedac_demo" / "model"
_LOST = "vllm.model_executor.models.registry:_TEXT_GENERATION_MODELS"
_READY_SECONDS = 600
_SAID = "SEDAC is installed and stands aside, vLLM serves without it"


def _ask_plain_vllm(environment: dict[str, str], log: Path) -> str:
    """Start vLLM's server without SEDAC on the demo model, ask it one completion, stop it; returns the answer.

    By its module, as `vllm serve` ends in it: the script itself asks for a distribution `vllm`, which the build for the CPU is not.
    """
    port = find_free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL), "--port", str(port)]
    command += ["--max-model-len", "512", "--enforce-eager", "--served-model-name", "plain"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + _READY_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"vllm serve did not get ready:\n{log.read_text()[-4000:]}")
                time.sleep(0.3)
        with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120) as client:
            return client.completions.create(model="plain", prompt="def f(", max_tokens=8, temperature=0).choices[0].text
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("change", "said", "plugins"),
    [
        (pretend_version, "vLLM 0.33.0 is installed, SEDAC supports 0.32.x", None),
        (pretend_version, "vLLM 0.33.0 is installed, SEDAC supports 0.32.x", "sedac,sedac_agent"),
        (lambda folder: lose(folder, _LOST), f"{_LOST} (", "sedac,sedac_agent"),
    ],
    ids=["version", "version-all-plugins", "internal"],
)
def test_plain_vllm_serves_with_one_warning(tmp_path, change: Callable[[Path], Path], said, plugins):
    environment = make_environment(change(tmp_path / "other"), **({"VLLM_PLUGINS": plugins} if plugins else {}))
    assert _ask_plain_vllm(environment, tmp_path / "log")
    warnings = [line for line in (tmp_path / "log").read_text().splitlines() if _SAID in line]
    assert len(warnings) == 1, warnings
    assert said in warnings[0]


def _serve(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sedac.app.cli", "serve", "--control", "none", "--max-model-len", "512", "--enforce-eager", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=_READY_SECONDS, env=environment)


def test_sedac_serve_is_refused_before_anything_starts_with_another_version(tmp_path):
    done = _serve(make_environment(pretend_version(tmp_path / "other")))
    assert done.returncode == 1
    assert "sedac: vLLM 0.33.0 is installed, SEDAC supports 0.32.x; install that" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("target", [_LOST, pytest.param("vllm.v1.worker.gpu_model_runner:GPUModelRunner._model_forward", marks=pytest.mark.thorough)])
def test_sedac_serve_is_refused_by_the_name_of_what_differs(tmp_path, target):
    done = _serve(make_environment(lose(tmp_path / "other", target)), "--port", str(find_free_port()))
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert "UnsupportedModel: vLLM 0.32." in output
    assert f"{target} (" in output
    assert "or serve without SEDAC (`vllm serve`)" in output
    assert "Loading weights took" not in output
