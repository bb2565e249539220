"""The control service's metrics, as Prometheus reads them."""

from __future__ import annotations

import socket
import time
import urllib.request

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sedac.client.client import ControlClient
from sedac.contract.v1 import control_pb2, control_pb2_grpc
from sedac.errors import PolicyInvalid
from sedac.policy.model import Checkpoint, Policy

from testing.control.engines import FIRST
from testing.control.running import RunningServer


@pytest.fixture
def settings(settings):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    return settings.model_copy(update={"metrics_port": port})


@pytest.fixture
def read(settings):
    def read_value(name: str, **labels: str) -> float | None:
        with urllib.request.urlopen(f"http://127.0.0.1:{settings.metrics_port}/metrics", timeout=5) as page:
            families = list(text_string_to_metric_families(page.read().decode()))
        return next((s.value for f in families for s in f.samples if s.name == name and s.labels == labels), None)

    return read_value


def _wait_for(expected: float, read, *args, **labels) -> None:
    deadline = time.monotonic() + 5
    while read(*args, **labels) != expected and time.monotonic() < deadline:
        time.sleep(0.02)
    assert read(*args, **labels) == expected


def _call(method: str, service: str = "Control", **more: str) -> dict[str, str]:
    return {"grpc_service": f"sedac.control.v1.{service}", "grpc_method": method, **more}


def test_all_series_are_there_from_the_start(server, read):
    for state in ("pending", "synced", "nacked", "stale"):
        assert read("sedac_control_engines", state=state) == 0
    for result in ("accepted", "refused"):
        assert read("sedac_control_policy_changes_total", result=result) == 0
    for result in ("ack", "nack"):
        assert read("sedac_control_engine_answers_total", result=result) == 0
    assert read("sedac_control_policy_revision") == 0
    assert read("grpc_server_started_total", **_call("UpdatePolicy")) == 0
    assert read("grpc_server_handled_total", **_call("UpdatePolicy", grpc_code="ABORTED")) == 0
    assert read("grpc_server_handling_seconds_count", **_call("UpdatePolicy")) == 0


def test_changes_and_their_codes_are_counted(client, read):
    client.update_policy(FIRST)
    client.update_policy(FIRST, validate_only=True)
    with pytest.raises(PolicyInvalid):
        client.update_policy(Policy(checkpoints=(Checkpoint(layer=0, threshold=-1),)))
    with pytest.raises(PolicyInvalid):
        client.update_policy(Policy(checkpoints=(Checkpoint(layer=0, threshold=-1),)), validate_only=True)
    assert read("sedac_control_policy_changes_total", result="accepted") == 1
    assert read("sedac_control_policy_changes_total", result="refused") == 1, "a dry run is no change"
    assert read("sedac_control_policy_revision") == 1
    assert read("grpc_server_started_total", **_call("UpdatePolicy")) == 4
    assert read("grpc_server_handled_total", **_call("UpdatePolicy", grpc_code="OK")) == 2
    assert read("grpc_server_handled_total", **_call("UpdatePolicy", grpc_code="INVALID_ARGUMENT")) == 2
    assert read("grpc_server_handling_seconds_count", **_call("UpdatePolicy")) == 4


def test_engines_are_counted_by_state(client, make_engine, read):
    silent = make_engine("e1", answer=False)
    push = silent.pushes.get(timeout=5)
    _wait_for(1, read, "sedac_control_engines", state="pending")
    silent.refuse = "no"
    silent.answer(push)
    _wait_for(1, read, "sedac_control_engines", state="nacked")
    assert read("sedac_control_engines", state="pending") == 0
    assert read("sedac_control_engine_answers_total", result="nack") == 1
    client.update_policy(FIRST)
    assert read("sedac_control_engines", state="pending") == 1, "a new revision is pending before it is answered"
    silent.close()
    _wait_for(1, read, "sedac_control_engines", state="stale")
    make_engine("e2")
    _wait_for(1, read, "sedac_control_engines", state="synced")
    _wait_for(1, read, "sedac_control_engine_answers_total", result="ack")


def test_streams_are_counted_when_they_end(client, make_engine, read):
    engine = make_engine()
    engine.pushes.get(timeout=5)
    assert read("grpc_server_started_total", **_call("Follow", "Discovery")) == 1
    engine.close()

    def read_ended(name: str, **labels: str) -> float:
        """A cancelled stream looks ended in peace where the service sees the end of the messages first."""
        return sum(read(name, **labels, grpc_code=code) for code in ("CANCELLED", "OK"))

    _wait_for(1, read_ended, "grpc_server_handled_total", **_call("Follow", "Discovery"))
    watch = client.watch_status()
    next(watch)
    watch.close()
    _wait_for(1, read, "grpc_server_handled_total", **_call("WatchStatus", grpc_code="CANCELLED"))


def test_a_failure_that_nobody_foresaw_is_counted_as_unknown(server, client, read, monkeypatch):
    monkeypatch.setattr(server.server._store, "list", lambda **_: 1 / 0)
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError, match="UNKNOWN"):
        control_pb2_grpc.ControlStub(channel).ListPolicyRevisions(control_pb2.ListPolicyRevisionsRequest())
    assert read("grpc_server_handled_total", **_call("ListPolicyRevisions", grpc_code="UNKNOWN")) == 1


def test_callers_cannot_make_series(server, read):
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError, match="UNIMPLEMENTED"):
        channel.unary_unary("/sedac.control.v1.Control/Invented")(b"")
    assert read("grpc_server_started_total", **_call("Invented")) is None


def test_the_port_is_free_again_after_the_stop(settings):
    for revision in (1, 2):
        running = RunningServer(settings)
        with ControlClient(running.address) as client:
            assert client.update_policy(FIRST).revision == revision
        running.stop()
