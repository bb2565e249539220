"""The whole product as a user starts it: `sedac serve` on free ports."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import psutil
from openai import OpenAI

READY_SECONDS = 600
_DISTINGUISHING = ("checkpoint", "result", "tier", "side", "limit", "reason")


def find_free_port() -> int:
    """Return a port of loopback that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class Served:
    """A running `sedac serve`."""

    process: subprocess.Popen[bytes]
    port: int
    control_address: str
    log: Path
    first_metrics: str = ""
    """What /metrics said before the first request."""

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def make_openai(self) -> OpenAI:
        """Return an OpenAI client of it, which asks once and no more."""
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def read_metrics(self) -> dict[str, float]:
        """Return SEDAC's samples by name and distinguishing labels: `sedac_exited_tokens_total{2}`, `sedac_policy_revision`."""
        samples = {}
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            for line in answer.read().decode().splitlines():
                match = re.fullmatch(r"(sedac_\w+)\{(.*)\} (\S+)", line)
                if match and not match[1].endswith("_bucket"):
                    labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
                    assert labels["model_name"] == "sedac-demo"
                    label = ",".join(labels[name] for name in _DISTINGUISHING if name in labels)
                    samples[match[1] + (f"{{{label}}}" if label else "")] = float(match[3])
        return samples

    def find_control(self) -> psutil.Process:
        """Return the control service's process."""
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if child.cmdline()[-2:] == ["sedac.app.cli", "control"])


def start(directory: Path, *arguments: str, **environment: str) -> Served:
    """Start `sedac serve` with a control service of its own, and return once it answers."""
    port, control_port = find_free_port(), find_free_port()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SEDAC_")}
    environment = clean | {
        "SEDAC_CONTROL_PORT": str(control_port),
        "SEDAC_CONTROL_METRICS_PORT": str(find_free_port()),
        "SEDAC_CONTROL_DATABASE": str(directory / "control.sqlite3"),
        "SEDAC_POLL_SECONDS": "0.25",
        **environment,
    }
    log = directory / "serve.log"
    command = [sys.executable, "-m", "sedac.app.cli", "serve", "--port", str(port), "--max-model-len", "512", "--enforce-eager", *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    served = Served(process=process, port=port, control_address=f"127.0.0.1:{control_port}", log=log)
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            urllib.request.urlopen(f"{served.url}/health", timeout=5).close()
            with urllib.request.urlopen(f"{served.url}/metrics", timeout=30) as answer:
                served.first_metrics = answer.read().decode()
            return served
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                stop(served)
                raise AssertionError(f"sedac serve did not get ready:\n{log.read_text()[-4000:]}") from None
            time.sleep(0.3)


def stop(served: Served) -> int:
    """Stop it as a user does; returns its exit status."""
    if served.process.poll() is None:
        served.process.send_signal(signal.SIGTERM)
        try:
            served.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(served.process.pid, signal.SIGKILL)
    return served.process.wait()
