"""What clients show, and the commands around it: tokens, certificates, health checks."""

from __future__ import annotations

import asyncio
import datetime
import json

import grpc
import pytest
from sedac.contract.credentials import Metadata, read_credentials
from sedac.contract.v1 import control_pb2, control_pb2_grpc
from sedac.control.access.principals import digest_token
from sedac.control.base.settings import ControlSettings
from sedac.control.server.health import check_health
from sedac.errors import ConfigError
from typer.testing import CliRunner

from testing.control.access import DENIED, GET, OK, call


def test_asyncio_clients_have_the_same_credentials(start, mtls_settings, authority, principals):
    running = start(mtls_settings)
    pair = authority.issue("ops")
    credentials = read_credentials(
        ca=authority.cert, client_cert=pair.cert, client_key=pair.key, token_file=principals.get_token_file("viewer"), server_name="localhost"
    )

    async def ask(metadata: Metadata) -> grpc.StatusCode:
        async with credentials.open_aio_channel(running.address) as channel:
            try:
                await control_pb2_grpc.ControlStub(channel).UpdatePolicy(control_pb2.UpdatePolicyRequest(), metadata=metadata, timeout=20)
            except grpc.aio.AioRpcError as error:
                return error.code()
        return OK

    assert asyncio.run(ask(credentials.make_call_metadata())) is DENIED, "the token's role"
    assert asyncio.run(ask(())) is grpc.StatusCode.INVALID_ARGUMENT, "the certificate's role may, and the message is empty"


def test_a_client_does_not_send_a_token_in_the_clear(principals):
    credentials = read_credentials(token_file=principals.get_token_file("viewer"))
    with pytest.raises(ConfigError, match="in the clear; set SEDAC_CONTROL_TLS=1"):
        credentials.open_channel("control.internal:50051")
    credentials.open_channel("127.0.0.1:1").close()


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"TLS": "perhaps"}, "SEDAC_CONTROL_TLS='perhaps'"),
        ({"TLS": "0", "CA": "cert"}, "SEDAC_CONTROL_TLS is 0 and certificates are named"),
        ({"CLIENT_CERT": "cert"}, "SEDAC_CONTROL_CLIENT_KEY is missing"),
        ({"CA": "/missing"}, "SEDAC_CONTROL_CA /missing can't be read: No such file"),
        ({"TOKEN_FILE": "/missing"}, "SEDAC_CONTROL_TOKEN_FILE /missing can't be read"),
        ({"TOKEN_FILE": "cert"}, "must hold one token"),
    ],
)
def test_a_wrong_variable_of_a_client_is_named(monkeypatch, pair, variables, complaint):
    for name, value in variables.items():
        monkeypatch.setenv(f"SEDAC_CONTROL_{name}", str(pair.cert) if value == "cert" else value)
    with pytest.raises(ConfigError, match=complaint) as refused:
        _call_with_what_the_environment_says()
    assert "BEGIN" not in str(refused.value)


def _call_with_what_the_environment_says() -> None:
    credentials = read_credentials()
    credentials.make_call_metadata()
    credentials.open_channel("127.0.0.1:1")


def test_the_clients_variables_do_not_upset_the_service(monkeypatch):
    monkeypatch.setenv("SEDAC_CONTROL_TOKEN_FILE", "/x")
    assert ControlSettings().port == 50051


def test_the_health_check_of_containers_follows_the_settings(start, tls_settings, monkeypatch):
    running = start(tls_settings)
    check_health(tls_settings.model_copy(update={"port": running.server.port}))
    with pytest.raises(Exception, match="does not answer"):
        check_health(tls_settings.model_copy(update={"port": running.server.port, "tls_cert": None}))


def test_the_command_makes_a_token_once_and_a_line_without_it(tmp_path, start, settings):
    from sedac.app.cli import app

    arguments = ["control", "token", "alice", "--role", "operator", "--expires-days", "2"]
    made = CliRunner().invoke(app, arguments)
    assert made.exit_code == 0
    token = made.stderr.split()[-1]
    assert token not in made.stdout
    entry = json.loads(made.stdout)
    assert entry["token_sha256"] == digest_token(token)
    assert datetime.datetime.fromisoformat(entry["expires"]) > datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1.9)
    other = CliRunner().invoke(app, [*arguments, "--token-file", str(tmp_path / "a.token")])
    assert other.stderr == ""
    assert (tmp_path / "a.token").stat().st_mode & 0o777 == 0o600
    assert json.loads(other.stdout)["token_sha256"] == digest_token((tmp_path / "a.token").read_text().strip()) != entry["token_sha256"]
    (tmp_path / "p.jsonl").write_text(made.stdout + other.stdout)
    running = start(settings.model_copy(update={"principals": tmp_path / "p.jsonl"}))
    with grpc.insecure_channel(running.address) as channel:
        assert call(channel, GET, (("authorization", f"Bearer {token}"),)) is OK
        assert call(channel, GET, read_credentials(token_file=tmp_path / "a.token").make_call_metadata()) is OK
