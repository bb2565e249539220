"""Credentials of the client and of `sedac ctl`, and the exit codes where they are not enough."""

from __future__ import annotations

import asyncio

import pytest
from sedac.client import AsyncControlClient, ControlClient, read_credentials
from sedac.ctl.root import app
from sedac.errors import ConfigError, ControlUnavailable, PermissionDenied, Unauthenticated
from typer.testing import CliRunner

from testing.control.engines import FIRST


@pytest.fixture
def secured(tls_settings, start):
    return start(tls_settings)


@pytest.fixture
def run(secured, authority):
    """Run a command against the service with TLS, and with what else is given."""

    def run(*arguments: str, env: dict[str, str] | None = None):
        options = ["--address", secured.address, "--ca", str(authority.cert)]
        return CliRunner().invoke(app, [*arguments, *options], env={"COLUMNS": "250", **(env or {})})

    return run


def test_exit_code_5_tells_who_may_not(run, principals):
    assert run("policy", "get").exit_code == 5, "no token"
    viewer, operator, admin = (str(principals.get_token_file(role)) for role in ("viewer", "operator", "admin"))
    assert run("status", "--token-file", viewer).exit_code == 0
    denied = run("policy", "rollback", "1", "--token-file", viewer)
    assert denied.exit_code == 5
    assert "viewer" in denied.stderr
    assert run("audit", "list", "--token-file", operator).exit_code == 5
    assert run("audit", "list", env={"SEDAC_CONTROL_TOKEN_FILE": admin}).exit_code == 0, "the environment's variables count too"


def test_no_secret_is_in_what_is_printed(run, principals):
    principals.remove("operator")
    done = run("status", "--token-file", str(principals.get_token_file("operator")))
    assert done.exit_code == 5
    assert principals.tokens["operator"] not in done.output


def test_wrong_certificates_and_files_are_told_with_their_remedy(secured, run, other_authority, tmp_path):
    strange = CliRunner().invoke(app, ["status", "--address", secured.address, "--ca", str(other_authority.cert)])
    assert strange.exit_code == 4
    assert "certificate" in strange.stderr or "TLS is on here" in strange.stderr
    plain = CliRunner().invoke(app, ["status", "--address", secured.address])
    assert plain.exit_code == 4
    missing = run("status", "--token-file", str(tmp_path / "absent"))
    assert missing.exit_code == 2
    assert "SEDAC_CONTROL_TOKEN_FILE" in missing.stderr
    assert run("status", "--cert", str(other_authority.cert)).exit_code == 2, "a certificate without its key"
    clear = CliRunner().invoke(app, ["status", "--address", "control.example:50051", "--token-file", str(tmp_path)])
    assert clear.exit_code == 2
    assert "in the clear" in clear.stderr


def test_both_clients_take_credentials(secured, authority, principals):
    def read(role: str):
        return read_credentials(ca=authority.cert, token_file=principals.get_token_file(role))

    with ControlClient(secured.address, credentials=read("operator")) as client:
        assert client.update_policy(FIRST).revision == 1
        with pytest.raises(PermissionDenied):
            list(client.list_audit_entries())
    with ControlClient(secured.address, credentials=read_credentials(ca=authority.cert)) as client, pytest.raises(Unauthenticated):
        client.get_status()

    async def main() -> None:
        async with AsyncControlClient(secured.address, credentials=read("admin")) as client:
            assert [entry.principal async for entry in client.list_audit_entries()] == ["token:operator"]

    asyncio.run(main())


def test_a_certificate_of_its_own_is_shown(mtls_settings, start, authority):
    running, ops = start(mtls_settings), authority.issue("ops")
    options = ["--address", running.address, "--ca", str(authority.cert)]
    done = CliRunner().invoke(app, ["status", *options, "--cert", str(ops.cert), "--key", str(ops.key)])
    assert done.exit_code == 0, done.output
    with (
        ControlClient(running.address, num_retries=0, credentials=read_credentials(ca=authority.cert)) as bare,
        pytest.raises((ControlUnavailable, Unauthenticated)),
    ):
        bare.get_status()


def test_credentials_are_read_when_the_client_is_made(monkeypatch, tmp_path):
    monkeypatch.setenv("SEDAC_CONTROL_CA", str(tmp_path / "absent.pem"))
    with pytest.raises(ConfigError, match=r"SEDAC_CONTROL_CA .*absent.pem can't be read"):
        ControlClient()
