"""The control service as a process: start, health, reflection, metrics port, stop, kill -9."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from sedac.client.client import ControlClient
from sedac.control.base.settings import ControlSettings
from sedac.errors import ConfigError, ControlUnavailable, SedacError
from sedac.policy.model import Checkpoint, Policy

from tests.control.conftest import FIRST, FakeEngine, RunningServer


def _make_command(path, **variables: str) -> dict:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SEDAC_")}
    environ |= {"SEDAC_CONTROL_PORT": "0", "SEDAC_CONTROL_METRICS_PORT": "0", "SEDAC_CONTROL_DATABASE": str(path), **variables}
    return {"args": [sys.executable, "-m", "sedac.app.cli", "control"], "env": environ, "stderr": subprocess.PIPE, "text": True}


@contextlib.contextmanager
def _serving(path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A service as `sedac control` starts it, and its address, taken from the start-up line."""
    process = subprocess.Popen(**_make_command(path))
    try:
        line = next((line for line in process.stderr if "control service on" in line), "")
        yield process, re.search(r"control service on (\S+),", line)[1]
    finally:
        process.kill()
        process.communicate()


def test_acknowledged_revisions_survive_kill_9_of_the_service(tmp_path):
    path, acknowledged = tmp_path / "control.sqlite3", [0]
    for _ in range(3):
        with _serving(path) as (process, address):
            killer = threading.Thread(target=_kill_when, args=(process, acknowledged, len(acknowledged) + 8))
            killer.start()
            with ControlClient(address) as client, contextlib.suppress(ControlUnavailable):
                while True:
                    made = client.update_policy(_make_policy(acknowledged[-1] + 1)).revision
                    assert made in (acknowledged[-1] + 1, acknowledged[-1] + 2), "only the write in flight may be beyond the last acknowledgement"
                    acknowledged.append(made)
            assert process.wait(10) == -signal.SIGKILL
            killer.join()
    with _serving(path) as (_, address), ControlClient(address) as client:
        revisions = list(client.list_revisions())
    numbers = [p.revision for p in revisions]
    assert numbers[0] in (acknowledged[-1], acknowledged[-1] + 1)
    assert numbers == list(range(numbers[0], 0, -1))
    assert all(len(p.checkpoints) == 20 and len({c.threshold for c in p.checkpoints}) == 1 for p in revisions), "none is half written"
    assert len(acknowledged) > 24, "the service was killed in the middle of writes"


def _kill_when(process: subprocess.Popen[str], acknowledged: list[int], length: int) -> None:
    while len(acknowledged) < length and process.poll() is None:
        time.sleep(0.001)
    process.kill()


def _make_policy(number: int) -> Policy:
    return Policy(checkpoints=tuple(Checkpoint(layer=layer, threshold=number) for layer in range(20)))


def test_sigterm_ends_it_in_peace_even_with_an_engine_connected(tmp_path):
    with _serving(tmp_path / "control.sqlite3") as (process, address):
        engine = FakeEngine(address)
        engine.pushes.get(timeout=5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert "control service stops" in process.stderr.read()
        engine.close()


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"SEDAC_CONTROL_PORT": "many"}, "SEDAC_CONTROL_PORT='many'"),
        ({"SEDAC_CONTROL_DATABSE": "x"}, "SEDAC_CONTROL_DATABSE is unknown; did you mean SEDAC_CONTROL_DATABASE?"),
        ({"SEDAC_CONTROL_DATABASE": "/dev/null/x"}, "name a writable file in SEDAC_CONTROL_DATABASE"),
        ({"SEDAC_CONTROL_HOST": "192.0.2.1", "SEDAC_CONTROL_PORT": "5", "SEDAC_CONTROL_INSECURE": "1"}, "192.0.2.1:5 can't be listened on"),
    ],
)
def test_a_wrong_setting_ends_in_one_line_with_the_remedy(tmp_path, variables, complaint):
    done = subprocess.run(**_make_command(tmp_path / "s.sqlite3", **variables), timeout=30)
    assert done.returncode == 1
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


def test_it_warns_where_others_can_reach_it_without_authentication(settings, caplog):
    caplog.set_level("INFO", "sedac")
    RunningServer(settings.model_copy(update={"host": "0.0.0.0", "insecure": True})).stop()
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "listening on 0.0.0.0 without authentication: let only trusted networks reach it"
    ]
    caplog.clear()
    RunningServer(settings).stop()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_it_listens_on_ipv6(settings):
    if not _has_ipv6():
        pytest.skip("this machine has no IPv6 loopback")
    running = RunningServer(settings.model_copy(update={"host": "::1"}))
    with ControlClient(f"[::1]:{running.server.port}") as client:
        assert client.update_policy(FIRST).revision == 1
    running.stop()


def _has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


def test_health_and_reflection_answer(server):
    with grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "sedac.control.v1.Control", "sedac.control.v1.Discovery"):
            assert health.Check(health_pb2.HealthCheckRequest(service=service)).status == health_pb2.HealthCheckResponse.SERVING
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
        assert {"sedac.control.v1.Control", "sedac.control.v1.Discovery"} <= {s.name for s in answer.list_services_response.service}


def test_whoever_watches_the_health_is_told_of_the_stop(settings):
    running = RunningServer(settings)
    with grpc.insecure_channel(running.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        stopping = threading.Thread(target=running.stop)
        stopping.start()
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        stopping.join(10)
    with ControlClient(running.address) as client, pytest.raises(ControlUnavailable):
        client.get_status()


def test_a_second_server_on_the_port_fails_with_the_remedy(server, settings, tmp_path):
    taken = settings.model_copy(update={"port": server.server.port, "database": tmp_path / "other" / "control.sqlite3"})
    with pytest.raises(ConfigError, match="change SEDAC_CONTROL_PORT"):
        RunningServer(taken)


def test_a_second_server_on_the_metrics_port_fails_with_the_remedy(settings):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="change SEDAC_CONTROL_METRICS_PORT"):
        RunningServer(settings.model_copy(update={"metrics_port": taken.getsockname()[1]}))


def test_a_second_server_on_the_database_fails_with_the_remedy(server, settings):
    with pytest.raises(ConfigError, match="in use by another control service; stop that one or change SEDAC_CONTROL_DATABASE"):
        RunningServer(settings)


def test_settings_are_read_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SEDAC_CONTROL_MAX_MESSAGE_BYTES", "8192")
    monkeypatch.setenv("SEDAC_CONTROL_ADDRESS", "elsewhere:1")  # the client's own, which may be set beside
    assert ControlSettings().max_message_bytes == 8192
    monkeypatch.setenv("SEDAC_CONTROL_MAX_MESSAGE_BYTES", "1")
    with pytest.raises(SedacError, match="SEDAC_CONTROL_MAX_MESSAGE_BYTES='1'"):
        ControlSettings()
