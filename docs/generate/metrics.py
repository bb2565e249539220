"""docs/reference/metrics.md: every Prometheus metric that SEDAC declares, read from its own collectors."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from sedac.agent import metrics as agent_metrics  # noqa: F401  declares the engine's metrics
from sedac.control.base.metrics import ControlMetrics
from sedac.control.rollout.metrics import RolloutMetrics

_HEAD = """# Metrics

This page is generated from the code (`make docs`). A counter's name ends in `_total`; a histogram has the series `_bucket`, `_sum` and
`_count`. [Operating](../operating.md#numbers) says where the two endpoints are and which numbers to look at first.
"""
_ENGINE = """
## Of the engine

On the engine's own `/metrics`, beside vLLM's `vllm:*`.
"""
_CONTROL = """
## Of the control service

On the control service's own port (`SEDAC_CONTROL_METRICS_PORT`, 9464 where it is not set).
"""


def render() -> dict[str, str]:
    """Return the page."""
    control = ControlMetrics()
    RolloutMetrics(control.registry)
    return {"metrics.md": _HEAD + _ENGINE + _make_table(_find(REGISTRY)) + _CONTROL + _make_table(_find(control.registry))}


def _find(registry: CollectorRegistry) -> list[MetricWrapperBase]:
    collectors = set(registry._names_to_collectors.values())  # prometheus_client has no public list; a collector without samples yields no labels
    ours = [c for c in collectors if isinstance(c, MetricWrapperBase) and c._name.startswith(("sedac_", "grpc_"))]
    return sorted(ours, key=lambda metric: metric._name)


def _make_table(metrics: Iterable[MetricWrapperBase]) -> str:
    rows = ["", "| metric | type | labels | meaning |", "|---|---|---|---|"]
    for metric in metrics:
        name = f"{metric._name}_total" if metric._type == "counter" else metric._name
        labels = ", ".join(f"`{label}`" for label in metric._labelnames) or "none"
        rows.append(f"| `{name}` | {metric._type} | {labels} | {metric._documentation} |")
    return "\n".join(rows) + "\n"
