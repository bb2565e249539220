"""Commands and environments to start servers with, as a matrix says; starts nothing itself."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import sedac_demo

from sedac.bench.matrix import Matrix, Model, System

SERVED_NAME = "bench"
"""The name under which every server knows its model."""


_given: set[int] = set()
"""Ports that were given away, on which their servers may not listen yet."""


def find_free_port() -> int:
    """Return a port of loopback on which nobody listens now, another one at each call."""
    while True:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = int(listener.getsockname()[1])
        if port not in _given:
            _given.add(port)
            return port


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A command to start a server with."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str]
    port: int = 0
    control_port: int = 0
    """Port of the control service. 0 where there is none."""


def find_directory(model: Model) -> Path:
    """Return the directory of a model."""
    return model.directory or sedac_demo.DIRECTORY / "model"


def find_draft(model: Model, system: System) -> Path | None:
    """Return the directory of the draft that a system uses for a model."""
    if system.kind == "plain" or not system.draft:
        return None
    return model.draft or (None if model.directory else sedac_demo.DIRECTORY / "draft")


def make_environment(matrix: Matrix, system: System) -> dict[str, str]:
    """Return the environment of a system, in which nothing of SEDAC's is set but what the matrix says."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SEDAC_") and name != "VLLM_PLUGINS"}
    fixed = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_NO_USAGE_STATS": "1"}  # as `sedac serve` sets them
    return {**fixed, **clean, **({"VLLM_PLUGINS": ""} if system.kind == "plain" else {}), **matrix.environment, **system.environment}


def plan_server(matrix: Matrix, model: Model, system: System, directory: Path) -> Plan:
    """Return the command for a system; `directory` is for its files, such as the control service's database."""
    port, control_port = find_free_port(), 0
    environment = make_environment(matrix, system)
    if system.kind == "plain":
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(find_directory(model))]
    else:
        control_port = find_free_port()
        environment |= {
            "SEDAC_CONTROL_PORT": str(control_port),
            "SEDAC_CONTROL_METRICS_PORT": str(find_free_port()),
            "SEDAC_CONTROL_DATABASE": str(directory / "control.sqlite3"),
        }
        command = [sys.executable, "-m", "sedac.app.cli", "serve", *([str(model.directory)] if model.directory else [])]
        command += ["--probe-set", str(model.probe_set)] if model.probe_set else []
        if not system.draft:
            command += ["--draft", "none"]
        elif model.draft:
            command += ["--draft", str(model.draft)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", SERVED_NAME, "--max-model-len", str(model.max_model_len)]
    command += [*matrix.flags, *system.flags]
    return Plan(name=system.name, command=tuple(command), environment=environment, port=port, control_port=control_port)
