"""What the tests of deploy/ share: the files, and the metrics that the code declares."""

from __future__ import annotations

import ast
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import REGISTRY
from prometheus_client.metrics import MetricWrapperBase
from sedac.agent import metrics as agent_metrics  # noqa: F401  declares the agent's
from sedac.control.base.metrics import ControlMetrics
from sedac.control.rollout.metrics import RolloutMetrics

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
VLLM_METRICS = "v1/metrics/loggers.py"


@dataclass(frozen=True, kw_only=True)
class Declared:
    """One metric as the code declares it; `name` without the suffixes that the exposition adds."""

    name: str
    kind: str
    labels: tuple[str, ...]
    buckets: tuple[float, ...] = ()
    """of a histogram of ours"""

    @property
    def series(self) -> set[str]:
        """The names under which Prometheus knows it."""
        suffixes = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"], "summary": ["_sum", "_count"]}[self.kind]
        return {self.name + suffix for suffix in suffixes}


def our_metrics() -> list[Declared]:
    """The agent's, which are in the global registry, and the control service's, which has its own."""
    control = ControlMetrics()
    RolloutMetrics(control.registry)
    collectors = [*REGISTRY._names_to_collectors.values(), *control.registry._names_to_collectors.values()]
    metrics = {value._name: value for value in collectors if isinstance(value, MetricWrapperBase) and value._name.startswith(("sedac_", "grpc_"))}
    return [
        Declared(name=name, kind=metric._type, labels=metric._labelnames, buckets=tuple(metric._kwargs.get("buckets", ())))
        for name, metric in metrics.items()
    ]


def vllm_metrics() -> list[Declared]:
    """vLLM's metrics, read from its source: importing vLLM would take ten seconds and register them."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed; its metrics cannot be compared (make setup installs it)")
    tree = ast.parse((Path(spec.origin).parent / VLLM_METRICS).read_text())
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = next((k.value.value for k in call.keywords if k.arg == "name" and isinstance(k.value, ast.Constant)), None)
        if isinstance(name, str) and name.startswith("vllm:"):
            kind = next(k for k in ("counter", "gauge", "histogram") if k in ast.unparse(call.func))
            found.append(Declared(name=name.removesuffix("_total") if kind == "counter" else name, kind=kind, labels=("model_name", "engine")))
    return found


@pytest.fixture(scope="session")
def declared() -> list[Declared]:
    """All metrics that our code and vLLM's declare."""
    return [*our_metrics(), *vllm_metrics()]


@pytest.fixture(scope="session")
def dashboard() -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((DEPLOY / "grafana/dashboards/sedac.json").read_text())
    return parsed


@pytest.fixture(scope="session")
def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


@pytest.fixture(scope="session")
def rules() -> list[dict[str, Any]]:
    """The alerts of all groups."""
    return [rule for group in yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text())["groups"] for rule in group["rules"]]
