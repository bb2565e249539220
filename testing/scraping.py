"""Metrics that move, and a real Prometheus that scrapes them."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import CollectorRegistry, generate_latest


def prepare(expression: str, model_name: str = ".*") -> str:
    """Put a panel's variables in: the engines of that model, rates over five seconds."""
    return expression.replace("$__rate_interval", "5s").replace("$model_name", model_name).replace("$engine", ".*")


@contextlib.contextmanager
def exposing(registry: CollectorRegistry, move: Callable[[], None]) -> Iterator[int]:
    """Serve a registry, and call `move` ten times a second, never while it is read; yields the port."""
    stop, lock = threading.Event(), threading.Lock()

    def keep_moving() -> None:
        while not stop.wait(0.1):
            with lock:
                move()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            with lock:
                page = generate_latest(registry)  # the text format, as vLLM has it: OpenMetrics would turn vllm:x into vllm_x
            self.wfile.write(page)

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threads = [threading.Thread(target=keep_moving), threading.Thread(target=server.serve_forever)]
        for thread in threads:
            thread.start()
        yield server.server_port
        stop.set()
        server.shutdown()
        for thread in threads:
            thread.join()


@contextlib.contextmanager
def scraping(exporter: int, directory: Path) -> Iterator[Callable[[str], list[Any] | None]]:
    """Run a Prometheus that scrapes a port twice a second; yields a function that returns a query's result, None while it is not up.

    A query that is wrong raises AssertionError with Prometheus' own words.
    """
    jobs = [{"job_name": "sedac-engine", "static_configs": [{"targets": [f"127.0.0.1:{exporter}"]}]}]
    config = {"global": {"scrape_interval": "500ms", "scrape_timeout": "500ms"}, "scrape_configs": jobs}
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = _find_free_port()
    flags = [f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data", f"--web.listen-address=127.0.0.1:{port}"]
    with (directory / "log").open("w") as log, subprocess.Popen(["prometheus", *flags], stdout=log, stderr=log) as process:

        def ask(expression: str) -> list[Any] | None:
            try:
                found: list[Any] = _ask(f"http://127.0.0.1:{port}/api/v1/query", query=expression)["data"]["result"]
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, (directory / "log").read_text()
                return None
            return found

        try:
            yield ask
        finally:
            process.terminate()


def wait_for(queries: dict[str, str], ask: Callable[[str], list[Any] | None], seconds: float = 60.0) -> dict[str, list[Any]]:
    """Ask until every query has a value that is a number; returns the results by name, those without a number as they are in the end."""
    found: dict[str, list[Any]] = {name: [] for name in queries}
    deadline, missing = time.monotonic() + seconds, list(queries)
    while missing and time.monotonic() < deadline:
        time.sleep(0.5)
        found |= {name: ask(queries[name]) or [] for name in missing}
        missing = [name for name in missing if not any(row["value"][1] != "NaN" for row in found[name])]
    return found


def _ask(url: str, **query: str) -> Any:
    try:
        with urllib.request.urlopen(f"{url}?{urllib.parse.urlencode(query)}", timeout=10) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{query}: {error.read().decode()}") from error


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
