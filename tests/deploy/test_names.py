"""Every metric that a dashboard or an alert names exists in the code: a renamed metric must not blank a panel."""

from __future__ import annotations

import re
from typing import Any

SYNTHETIC = {"up"}  # Prometheus makes it itself
NAME = re.compile(r"(?<![\w:$])(?:sedac_|vllm:|grpc_)[\w:]+|(?<![\w:$])up(?=\b)")


def names_in(expression: str) -> set[str]:
    """Metric names in PromQL: what is left of them once strings and grouping clauses are taken out."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", bare)
    bare = re.sub(r"\{[^}]*\}", "", bare)
    return set(NAME.findall(bare))


def test_the_reader_of_names_sees_names_only() -> None:
    expression = 'sum by (grpc_method, le) (rate(vllm:a_b_total{model_name=~"sedac_x"}[5m])) / on (engine) sedac_steps_total unless up{job="up"} == 1'
    assert names_in(expression) == {"vllm:a_b_total", "sedac_steps_total", "up"}


def test_panels_name_declared_metrics(panels: list[dict[str, Any]], declared: list[Any]) -> None:
    known = set().union(*(metric.series for metric in declared)) | SYNTHETIC
    unknown = {(panel["title"], name) for panel in panels for target in panel["targets"] for name in names_in(target["expr"]) - known}
    assert not unknown
    assert all(names_in(target["expr"]) for panel in panels for target in panel["targets"])


def test_variables_name_declared_metrics(dashboard: dict[str, Any], declared: list[Any]) -> None:
    known = {series: metric for metric in declared for series in metric.series}
    queries = [variable["query"]["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    assert queries
    for query in queries:
        metric, label = re.fullmatch(r"label_values\(([\w:]+)(?:\{.*\})?, (\w+)\)", query).groups()  # type: ignore[union-attr]
        assert label in known[metric].labels


def test_alerts_name_declared_metrics(rules: list[dict[str, Any]], declared: list[Any]) -> None:
    known = set().union(*(metric.series for metric in declared)) | SYNTHETIC
    assert rules
    for rule in rules:
        names = names_in(rule["expr"])
        assert names, rule["alert"]
        assert names <= known, (rule["alert"], names - known)


def test_our_counters_are_all_shown_or_watched(panels: list[dict[str, Any]], rules: list[dict[str, Any]], declared: list[Any]) -> None:
    """A metric of ours that no panel and no alert uses is either missing there or of no use."""
    used = {name for panel in panels for target in panel["targets"] for name in names_in(target["expr"])}
    used |= {name for rule in rules for name in names_in(rule["expr"])}
    assert not [metric.name for metric in declared if metric.name.startswith("sedac_") and not metric.series & used]
