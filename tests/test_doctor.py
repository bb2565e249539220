"""`sedac doctor` asks a running engine which levels are faster than full on its machine."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from sedac.app.doctor import examine_engine

STATUS = {"state": "SYNCED", "revision": 3, "layout": {"checkpoint_layers": [2, 5]}}


@pytest.fixture
def serve():
    """Return a function that answers every GET with a status, and gives the address."""
    servers = []

    def start(status: dict[str, Any]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = json.dumps(status).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_levels_are_told_by_how_many_rows_they_pay(serve):
    url = serve({**STATUS, "faster_rows": {"width-40": 8, "contextual-40": 1, "width-10": 0}})
    engine, speed = examine_engine(url)
    assert (engine.state, engine.detail) == ("ok", f"{url}: SYNCED, revision 3, checkpoints after layers 2, 5, no draft")
    assert (speed.name, speed.state) == ("levels that pay", "ok")
    assert "width-40 up to 8 rows, contextual-40 up to 1 row; never: width-10" in speed.detail


def test_an_engine_on_which_no_level_pays_says_so(serve):
    _, speed = examine_engine(serve({**STATUS, "faster_rows": {"width-40": 0}}))
    assert speed.state == "absent"
    assert "faster than full on this machine: none; never: width-40" in speed.detail


def test_an_engine_that_has_not_measured_says_nothing(serve):
    assert [found.name for found in examine_engine(serve({**STATUS, "faster_rows": {}}))] == ["running engine"]
    assert [found.name for found in examine_engine(serve(STATUS))] == ["running engine"]


def test_where_nothing_answers_that_is_the_only_finding():
    assert [(found.name, found.state) for found in examine_engine("http://127.0.0.1:1")] == [("running engine", "absent")]
