"""The queries and alerts against a real Prometheus, where one is installed (Debian's package `prometheus` has it and promtool)."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

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
    "arm": ["stable", "canary"],
}

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (apt-get install prometheus)")
needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed (apt-get install prometheus)")


def ask(url: str, **query: str) -> Any:
    """Call Prometheus' HTTP API; an error of the query raises with Prometheus' own words."""
    try:
        with urllib.request.urlopen(f"{url}?{urllib.parse.urlencode(query)}", timeout=10) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{query}: {error.read().decode()}") from error


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


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
    stop = threading.Event()

    def move() -> None:
        while not stop.wait(0.1):
            for change in moves:
                change(0.5)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(generate_latest(registry))  # the text format, as vLLM has it: OpenMetrics would turn vllm:x into vllm_x

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threads = [threading.Thread(target=move), threading.Thread(target=server.serve_forever)]
        for thread in threads:
            thread.start()
        yield server.server_port
        stop.set()
        server.shutdown()
        for thread in threads:
            thread.join()


@needs_prometheus
def test_every_query_of_the_dashboard_finds_data(exporter: int, panels: list[dict[str, Any]], tmp_path: Path) -> None:
    jobs = [{"job_name": "sedac-engine", "static_configs": [{"targets": [f"127.0.0.1:{exporter}"]}]}]
    config = {"global": {"scrape_interval": "500ms", "scrape_timeout": "500ms"}, "scrape_configs": jobs}
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    flags = [f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address=127.0.0.1:{port}"]
    queries = {}
    for panel in panels:
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", "5s").replace("$model_name", ".*").replace("$engine", ".*")
            queries[f"{panel['title']}: {expression}"] = expression
    with (tmp_path / "log").open("w") as log, subprocess.Popen(["prometheus", *flags], stdout=log, stderr=log) as process:
        try:
            url, deadline, empty = f"http://127.0.0.1:{port}/api/v1/query", time.monotonic() + 60, list(queries)
            while empty and time.monotonic() < deadline:
                time.sleep(0.5)
                try:
                    answers = {title: ask(url, query=queries[title])["data"]["result"] for title in empty}
                except (urllib.error.URLError, ConnectionError):
                    assert process.poll() is None, (tmp_path / "log").read_text()
                    continue
                empty = [title for title, result in answers.items() if not any(row["value"][1] != "NaN" for row in result)]
        finally:
            process.terminate()
    assert not empty
