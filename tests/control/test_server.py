"""The control service as a process: start, health, reflection, metrics port, stop, kill -9."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from sedac.client.client import ControlClient
from sedac.control.base.settings import ControlSettings
from sedac.errors import ConfigError, ControlUnavailable, SedacError
from sedac.policy.model import Checkpoint, Policy

from testing.control.engines import FIRST, FakeEngine
from testing.control.processes import ControlProcess, make_environment
from testing.control.running import RunningServer


def _make_command(path, **variables: str) -> dict:
    environ = make_environment(path, **variables)
    return {"args": [sys.executable, "-m", "sedac.app.cli", "control"], "env": environ, "stderr": subprocess.PIPE, "text": True}


def test_acknowledged_revisions_survive_kill_9_of_the_service(tmp_path):
    path, acknowledged = tmp_path / "control.sqlite3", [0]
    for _ in range(3):
        with ControlProcess(path) as service:
            length = len(acknowledged) + 8
            killer = service.kill_once(lambda length=length: len(acknowledged) >= length)
            with ControlClient(service.address) as client, contextlib.suppress(ControlUnavailable):
                while True:
                    made = client.update_policy(_make_policy(acknowledged[-1] + 1)).revision
                    assert made in (acknowledged[-1] + 1, acknowledged[-1] + 2), "only the write in flight may be beyond the last acknowledgement"
                    acknowledged.append(made)
            assert service.process.wait(10) == -signal.SIGKILL
            killer.join()
    with ControlProcess(path) as service, ControlClient(service.address) as client:
        revisions = list(client.list_revisions())
    numbers = [p.revision for p in revisions]
    assert numbers[0] in (acknowledged[-1], acknowledged[-1] + 1)
    assert numbers == list(range(numbers[0], 0, -1))
    assert all(len(p.checkpoints) == 20 and len({c.threshold for c in p.checkpoints}) == 1 for p in revisions), "none is half written"
    assert len(acknowledged) > 24, "the service was killed in the middle of writes"


def _make_policy(number: int) -> Policy:
    return Policy(checkpoints=tuple(Checkpoint(layer=layer, threshold=number) for layer in range(20)))


def test_sigterm_ends_it_in_peace_even_with_an_engine_connected(tmp_path):
    with ControlProcess(tmp_path / "control.sqlite3") as service:
        engine = FakeEngine(service.address)
        engine.pushes.get(timeout=5)
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(10) == 0
        assert "control service stops" in service.read_log()
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
