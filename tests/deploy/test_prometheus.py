"""The queries and alerts against a real Prometheus, where one is installed (Debian's package `prometheus` has it and promtool)."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from sedac.agent.metrics import EngineMetrics
from sedac.contract.stats import Stats

from testing.figures import make_controller, make_drafting
from testing.scraping import exposing, prepare, scraping, wait_for
from testing.workers import LAYOUT

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy/prometheus"
VALUES = {
    "model_name": ["demo"],
    "engine": ["0"],
    "checkpoint": ["3", "7"],
    "tier": ["exact", "balanced"],
    "result": ["ack", "nack", "accepted", "refused"],
    "state": ["pending", "synced", "nacked", "stale", "measuring", "trying", "drafting", "paused"],
    "kind": ["adapter"],
    "position": ["0", "1"],
    "sequences": ["1", "4"],
    "part": ["plain", "verify", "draft"],
    "limit": ["mean", "lower", "upper"],
    "side": ["stable", "candidate"],
}

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (apt-get install prometheus)")
needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed (apt-get install prometheus)")


@needs_promtool
def test_rules_and_their_examples() -> None:
    for command in (["check", "rules", "rules.yml"], ["test", "rules", "rules_test.yml"]):
        done = subprocess.run(["promtool", *command], cwd=PROMETHEUS, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_config(tmp_path: Path) -> None:
    config = (PROMETHEUS / "prometheus.yml").read_text().replace("/etc/prometheus/", f"{PROMETHEUS}/")
    (tmp_path / "prometheus.yml").write_text(config)
    done = subprocess.run(["promtool", "check", "config", str(tmp_path / "prometheus.yml")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_an_example(rules: list[dict[str, Any]]) -> None:
    tests = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())["tests"]
    fired = {check["alertname"] for test in tests for check in test["alert_rule_test"] if check["exp_alerts"]}
    quiet = {check["alertname"] for test in tests for check in test["alert_rule_test"] if not check["exp_alerts"]}
    assert fired == quiet == {rule["alert"] for rule in rules}


@pytest.fixture
def exporter(declared: list[Any]) -> Iterator[int]:
    """A port with every declared metric on it, moving."""
    registry = CollectorRegistry()
    moves = []
    for metric in declared:
        kind = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}[metric.kind]
        parent = kind(metric.name, "for the test", metric.labels, registry=registry, **({"buckets": metric.buckets} if metric.buckets else {}))
        combinations = product(*(VALUES.get(label, ["some"]) for label in metric.labels))
        children = [parent.labels(*values) if values else parent for values in combinations]
        moves += [child.observe if metric.kind == "histogram" else child.set if metric.kind == "gauge" else child.inc for child in children]

    def move() -> None:
        for change in moves:
            change(0.5)

    with exposing(registry, move) as port:
        yield port


@needs_prometheus
def test_every_query_of_the_dashboard_finds_data(exporter: int, panels: list[dict[str, Any]], tmp_path: Path) -> None:
    queries = {f"{panel['title']}: {prepare(target['expr'])}": prepare(target["expr"]) for panel in panels for target in panel["targets"]}
    with scraping(exporter, tmp_path) as ask:
        found = wait_for(queries, ask)
    assert not [title for title, result in found.items() if not any(row["value"][1] != "NaN" for row in result)]


@needs_prometheus
def test_the_panels_of_self_speculation_show_the_ratios_of_the_words(panels: list[dict[str, Any]], tmp_path: Path) -> None:
    """The same steps again and again, of three sequences: one without drafts, one with two drafts of two accepted, one with one of three."""
    metrics, controller = EngineMetrics(model_name="speculating", layout=LAYOUT), (make_controller(1), make_controller(4, "paused", 0.75))
    total = make_drafting(controller=controller)

    def move() -> None:
        nonlocal total
        total = total.plus(make_drafting((0, 0), (2, 2), (3, 1)))
        metrics.add(Stats(drafting=total))

    expected = {
        "AR and TRR": [{"adapter": 3 / 5}, {"adapter": 3 / 6}],
        "Tokens per step": [{"adapter": 2.0}, {"adapter": 2.5}, {"1": 2.5, "4": 2.5}],
        "Acceptance by position": [{"0": 1.0, "1": 0.5, "2": 0.0}],
        "Time spent drafting": [{"adapter": 5 * 0.03125 / 0.75}, {"adapter": 1 / 3}],
        "Gain of drafting by batch size": [{"1": 1.25, "4": 0.75}],
        "Controller by batch size": [{"1": 3, "4": 4}],
    }
    move()
    queries = {
        f"{panel['title']} {i}": prepare(target["expr"], "speculating")
        for panel in panels
        for i, target in enumerate(panel["targets"][: len(expected.get(panel["title"], ()))])
    }
    lengths = next(prepare(panel["targets"][0]["expr"], "speculating") for panel in panels if panel["title"] == "Draft length")
    with exposing(REGISTRY, move) as port, scraping(port, tmp_path) as ask:
        found = wait_for({**queries, "lengths": lengths}, ask)
    shown = {title: {_get_label(row): float(row["value"][1]) for row in rows} for title, rows in found.items()}
    buckets = shown.pop("lengths")
    assert shown == {f"{title} {i}": pytest.approx(values) for title, each in expected.items() for i, values in enumerate(each)}
    assert [buckets[le] / buckets["+Inf"] for le in ("0.0", "1.0", "2.0", "3.0", "16.0")] == pytest.approx([1 / 3, 1 / 3, 2 / 3, 1, 1])


def _get_label(row: dict[str, Any]) -> str:
    return next(str(value) for name, value in row["metric"].items() if name != "instance")
