"""Who gets in: TLS and mTLS with an authority of this process, tokens, roles, and all of it changed while the service runs."""

from __future__ import annotations

import datetime
import json
import logging
import queue
import threading
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import generate_latest
from sedac import wire
from sedac.control.auth import OPEN, RULES
from sedac.control.health import check_health
from sedac.control.principals import digest_token, read_principals
from sedac.control.settings import ControlSettings
from sedac.control.v1 import audit_log_pb2_grpc, control_pb2, control_pb2_grpc
from sedac.control.v1.audit_log_pb2 import ListAuditEntriesRequest
from sedac.credentials import read_credentials
from sedac.errors import ConfigError
from typer.testing import CliRunner

from tests.control.access import METHODS, ROLES, PrincipalsFile, call, find_error, wait_until
from tests.control.authority import Authority
from tests.control.conftest import FIRST, RunningServer

GET, UPDATE, WATCH = (f"/sedac.control.v1.Control/{name}" for name in ("GetStatus", "UpdatePolicy", "WatchStatus"))
FOLLOW, DOWNLOAD = "/sedac.control.v1.Discovery/Follow", "/sedac.control.v1.ProbeSets/DownloadProbeSet"
REFLECT = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
OK, UNAUTHENTICATED, DENIED = grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
UPDATE_MESSAGE = control_pb2.UpdatePolicyRequest(policy=wire.policy_to_proto(FIRST)).SerializeToString()


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"), "authority")


@pytest.fixture(scope="module")
def other_authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("other"), "other-authority")


@pytest.fixture
def principals(tmp_path) -> PrincipalsFile:
    file = PrincipalsFile(tmp_path)
    for role in ROLES:
        file.add(role, role)
    return file


@pytest.fixture
def pair(authority):
    return authority.issue("localhost")


@pytest.fixture
def tls_settings(settings, principals, pair) -> ControlSettings:
    return settings.model_copy(update={"tls_cert": pair.cert, "tls_key": pair.key, "principals": principals.path})


@pytest.fixture
def start(request):
    """Start a service with the given settings; it is stopped when the test ends."""

    def start(settings: ControlSettings) -> RunningServer:
        running = RunningServer(settings)
        request.addfinalizer(running.stop)
        return running

    return start


@pytest.fixture
def open_channel(request, authority):
    """Open a channel that trusts the authority, with the given credentials beside."""

    def open_channel(server: RunningServer, **credentials) -> grpc.Channel:
        channel = read_credentials(**{"ca": authority.cert, **credentials}).open_channel(server.address)
        request.addfinalizer(channel.close)
        return channel

    return open_channel


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Iterator[tuple[grpc.Channel, PrincipalsFile]]:
    """A service on loopback that asks for tokens, for the tests that change nothing of it."""
    directory = tmp_path_factory.mktemp("shared")
    file = PrincipalsFile(directory)
    for role in ROLES:
        file.add(role, role)
    running = RunningServer(ControlSettings(port=0, metrics_port=0, database=directory / "c.sqlite3", drain_seconds=0.2, principals=file.path))
    with grpc.insecure_channel(running.address) as channel:
        yield channel, file
    running.stop()


# ---- roles ----


def test_every_method_of_the_contract_has_a_rule_and_no_other_has():
    assert set(RULES) - {REFLECT} == set(METHODS)
    assert not OPEN & set(RULES)


@pytest.mark.parametrize("path", METHODS)
def test_a_method_is_for_its_roles_alone(shared, path):
    channel, file = shared
    if call(channel, path, file.make_metadata("admin"), timeout=0.5) is grpc.StatusCode.UNIMPLEMENTED:
        pytest.skip("nobody serves this method yet")
    code, details, reason = find_error(channel, path)
    assert (code, reason) == (UNAUTHENTICATED, "Unauthenticated")
    assert "SEDAC_CONTROL_TOKEN_FILE" in details
    for role in ROLES:
        code, details, reason = find_error(channel, path, file.make_metadata(role), timeout=20 if role not in RULES[path] else 0.5)
        if role in RULES[path]:
            assert code not in (UNAUTHENTICATED, DENIED), (role, details)
        else:
            assert (code, reason) == (DENIED, "PermissionDenied"), (role, details)
            assert f"token:{role} has role {role} and {path.rpartition('/')[2]} needs role {' or '.join(RULES[path])}" in details


def test_engines_only_follow_and_fetch():
    assert {path for path, roles in RULES.items() if "engine" in roles} == {FOLLOW, DOWNLOAD}


def test_viewers_change_nothing():
    allowed = {path for path, roles in RULES.items() if "viewer" in roles} - {REFLECT}
    assert all(METHODS[path].name.startswith(("Get", "List", "Watch")) for path in allowed)
    assert allowed == {path for path, m in METHODS.items() if m.name.startswith(("Get", "List", "Watch")) and "AuditLog" not in path}


def test_operators_do_what_viewers_do_and_administrators_what_operators_do():
    assert all("operator" in roles for roles in RULES.values() if "viewer" in roles)
    assert all("admin" in roles for roles in RULES.values() if "operator" in roles)
    assert {path for path, roles in RULES.items() if roles == ("admin",)} == {
        "/sedac.control.v1.AuditLog/ListAuditEntries",
        "/sedac.control.v1.ProbeSets/DeleteProbeSet",
    }


def test_health_is_open_and_reflection_is_not(shared):
    channel, file = shared
    stub = health_pb2_grpc.HealthStub(channel)
    assert stub.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
    watch = stub.Watch(health_pb2.HealthCheckRequest())
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()
    reflect = channel.stream_stream(REFLECT)
    with pytest.raises(grpc.RpcError) as refused:
        next(reflect(iter([b""]), timeout=20))
    assert refused.value.code() is UNAUTHENTICATED
    with pytest.raises(grpc.RpcError) as refused:
        next(reflect(iter([b""]), timeout=20, metadata=file.make_metadata("engine")))
    assert refused.value.code() is DENIED
    assert next(reflect(iter([b"\x3a\x00"]), timeout=20, metadata=file.make_metadata("viewer")))


@pytest.mark.parametrize(
    "sent",
    [
        ["Bearer wrong"],
        ["Bearer "],
        ["Basic dXNlcjpwYXNz"],
        ["{token}"],
        ["Bearer {token}x"],
        ["Bearer {token}", "Bearer {token}"],
        ["Bearer {digest}"],
    ],
)
def test_what_is_no_known_token_is_unauthenticated(shared, sent):
    channel, file = shared
    token = file.tokens["admin"]
    metadata = tuple(("authorization", value.format(token=token, digest=digest_token(token))) for value in sent)
    code, details, reason = find_error(channel, GET, metadata)
    assert (code, reason) == (UNAUTHENTICATED, "Unauthenticated")
    assert token not in details
    assert find_error(channel, GET, file.make_metadata("admin"))[0] is OK


def test_a_stranger_sends_nothing_that_is_read(shared):
    """The caller is asked before its message is parsed."""
    channel, _ = shared
    assert find_error(channel, UPDATE, message=b"\xff" * 1000)[0] is UNAUTHENTICATED


def test_what_is_no_message_is_refused_with_the_reason(shared):
    channel, file = shared
    code, details, reason = find_error(channel, UPDATE, file.make_metadata("operator"), message=b"\xff" * 1000)
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "PolicyInvalid")
    assert "1000 bytes that are no message of this method" in details


def test_an_engine_speaks_for_the_id_it_is_bound_to_alone(start, settings, principals):
    principals.add("bound", "engine", engine_id="e1")
    running = start(settings.model_copy(update={"principals": principals.path}))
    with grpc.insecure_channel(running.address) as channel:
        other = control_pb2.EngineMessage(hello=control_pb2.EngineHello(engine_id="e2")).SerializeToString()
        code, details, reason = find_error(channel, FOLLOW, principals.make_metadata("bound"), message=other)
        assert (code, reason) == (DENIED, "PermissionDenied")
        assert "set SEDAC_ENGINE_ID=e1" in details
        own = control_pb2.EngineHello(engine_id="e1", initial_policy=wire.policy_to_proto(FIRST))
        outbox: queue.Queue[control_pb2.EngineMessage | None] = queue.Queue()
        outbox.put(control_pb2.EngineMessage(hello=own))
        stream = control_pb2_grpc.DiscoveryStub(channel).Follow(iter(outbox.get, None), metadata=principals.make_metadata("bound"), timeout=20)
        assert next(stream).policy.revision == 1
        outbox.put(None)


# ---- TLS ----


def test_tokens_travel_over_tls(start, tls_settings, open_channel, principals):
    channel = open_channel(start(tls_settings))
    assert call(channel, GET, principals.make_metadata("viewer")) is OK
    assert call(channel, UPDATE, principals.make_metadata("viewer"), message=UPDATE_MESSAGE) is DENIED
    assert call(channel, UPDATE, principals.make_metadata("operator"), message=UPDATE_MESSAGE) is OK
    assert call(channel, GET) is UNAUTHENTICATED


def test_a_client_that_trusts_another_authority_or_none_does_not_connect(start, tls_settings, open_channel, other_authority, principals):
    running = start(tls_settings)
    assert call(open_channel(running, ca=other_authority.cert), GET, principals.make_metadata("admin")) is UNAVAILABLE
    with grpc.insecure_channel(running.address) as channel:
        assert call(channel, GET, principals.make_metadata("admin")) is UNAVAILABLE


def test_the_server_name_can_be_told(start, settings, principals, open_channel, authority):
    pair = authority.issue("control", dns=("control.internal",))
    running = start(settings.model_copy(update={"tls_cert": pair.cert, "tls_key": pair.key, "principals": principals.path}))
    assert call(open_channel(running), GET, principals.make_metadata("viewer")) is UNAVAILABLE
    assert call(open_channel(running, server_name="control.internal"), GET, principals.make_metadata("viewer")) is OK


def test_an_expired_certificate_of_the_service_is_not_trusted(start, tls_settings, pair, open_channel, authority, principals):
    pair.replace_by(authority.issue("localhost", expired=True))
    assert call(open_channel(start(tls_settings)), GET, principals.make_metadata("admin")) is UNAVAILABLE


@pytest.fixture
def mtls_settings(tls_settings, authority, principals) -> ControlSettings:
    lines = {
        "ops": {"name": "ops", "role": "operator", "certificate": "ops"},
        "audit": {"name": "audit", "role": "admin", "certificate": "spiffe://example/audit"},
        "host": {"name": "host", "role": "viewer", "certificate": "host.example"},
    }
    for name, line in lines.items():
        principals.add_line(name, json.dumps(line))
    return tls_settings.model_copy(update={"tls_client_ca": authority.cert})


def test_mtls_lets_nobody_connect_without_a_good_certificate(start, mtls_settings, open_channel, authority, other_authority, principals):
    running = start(mtls_settings)
    admin = principals.make_metadata("admin")
    assert call(open_channel(running), GET, admin) is UNAVAILABLE, "no certificate, in spite of the token"
    for pair in (other_authority.issue("ops"), authority.issue("ops", expired=True)):
        assert call(open_channel(running, client_cert=pair.cert, client_key=pair.key), GET, admin) is UNAVAILABLE
    good = authority.issue("ops")
    assert call(open_channel(running, client_cert=good.cert, client_key=good.key), GET) is OK


def test_mtls_principals_are_named_by_common_name_dns_or_uri(start, mtls_settings, open_channel, authority, principals):
    running = start(mtls_settings)

    def connect(*args, **names) -> grpc.Channel:
        pair = authority.issue(*args, **names)
        return open_channel(running, client_cert=pair.cert, client_key=pair.key)

    ops = connect("ops")
    assert call(ops, UPDATE, message=UPDATE_MESSAGE) is OK
    assert call(ops, "/sedac.control.v1.AuditLog/ListAuditEntries") is DENIED
    audit = connect("someone", uris=("spiffe://example/audit",))
    (entry,) = audit_log_pb2_grpc.AuditLogStub(audit).ListAuditEntries(ListAuditEntriesRequest(), timeout=20).entries
    assert (entry.principal, entry.author, entry.action) == ("certificate:ops", "ops", "UpdatePolicy")
    assert call(connect("anyone", dns=("host.example",)), GET) is OK
    assert find_error(connect("nobody"), GET)[1].startswith("the names of this certificate belong to no principal")
    assert "several principals" in find_error(connect("ops", dns=("host.example",)), GET)[1]
    assert call(ops, UPDATE, principals.make_metadata("viewer"), message=UPDATE_MESSAGE) is DENIED, "a token that is sent decides"
    assert call(ops, GET, (("authorization", "Bearer wrong"),)) is UNAUTHENTICATED, "a wrong token is not made good by a certificate"


def test_without_principals_the_audit_log_still_names_the_certificate(start, mtls_settings, open_channel, authority):
    running = start(mtls_settings.model_copy(update={"principals": None}))
    pair = authority.issue("carol")
    channel = open_channel(running, client_cert=pair.cert, client_key=pair.key)
    assert call(channel, UPDATE, message=UPDATE_MESSAGE) is OK
    (entry,) = audit_log_pb2_grpc.AuditLogStub(channel).ListAuditEntries(ListAuditEntriesRequest(), timeout=20).entries
    assert entry.principal == "certificate:carol"


# ---- changes while the service runs ----


def test_a_rotated_token_counts_at_once_and_the_old_one_no_more(start, tls_settings, open_channel, principals):
    channel = open_channel(start(tls_settings))
    credentials = read_credentials(token_file=principals.get_token_file("operator"))
    old = credentials.make_call_metadata()
    assert call(channel, GET, old) is OK
    principals.add("operator", "operator")
    assert call(channel, GET, old) is UNAUTHENTICATED
    assert credentials.make_call_metadata() != old, "the client reads its file again"
    assert call(channel, GET, credentials.make_call_metadata()) is OK


def test_a_revoked_token_ends_what_it_started(start, tls_settings, open_channel, principals):
    running = start(tls_settings)
    channel = open_channel(running)
    watch = control_pb2_grpc.ControlStub(channel).WatchStatus(control_pb2.WatchStatusRequest(), metadata=principals.make_metadata("viewer"))
    kept = control_pb2_grpc.ControlStub(channel).WatchStatus(control_pb2.WatchStatusRequest(), metadata=principals.make_metadata("admin"))
    assert next(watch) is not None
    assert next(kept) is not None
    old = principals.make_metadata("viewer")
    principals.remove("viewer")
    with pytest.raises(grpc.RpcError) as ended:
        for _ in watch:
            pass
    assert ended.value.code() is UNAUTHENTICATED
    assert "revoked" in ended.value.details()
    assert call(channel, GET, old) is UNAUTHENTICATED
    assert next(kept) is not None
    kept.cancel()


def test_an_expired_principal_is_refused_and_its_streams_end(start, tls_settings, open_channel, principals):
    principals.add("late", "viewer", expires_days=-1.0)
    principals.add("soon", "viewer", expires_days=3 / 86400)
    channel = open_channel(start(tls_settings))
    assert find_error(channel, GET, principals.make_metadata("late"))[0] is UNAUTHENTICATED
    watch = control_pb2_grpc.ControlStub(channel).WatchStatus(control_pb2.WatchStatusRequest(), metadata=principals.make_metadata("soon"), timeout=30)
    with pytest.raises(grpc.RpcError) as ended:
        for _ in watch:
            pass
    assert ended.value.code() is UNAUTHENTICATED
    assert call(channel, GET, principals.make_metadata("soon")) is UNAUTHENTICATED


@pytest.mark.parametrize("broken", ["", "{", '{"name": "x", "role": "boss", "token_sha256": "' + "0" * 64 + '"}', '{"name": "x", "role": "viewer"}'])
def test_a_broken_principals_file_keeps_the_last_good_one(start, tls_settings, open_channel, principals, caplog, broken):
    running = start(tls_settings)
    channel = open_channel(running)
    refused = running.server._metrics.file_refused.labels("principals")._value
    principals.path.write_text(broken)
    wait_until(lambda: refused.get() == 1, "the metric shows the broken file")
    assert call(channel, GET, principals.make_metadata("viewer")) is OK
    (line,) = [record.getMessage() for record in caplog.records if "can't be used" in record.getMessage()]
    assert str(principals.path) in line
    principals.add("viewer", "viewer")
    assert call(channel, GET, principals.make_metadata("viewer")) is OK
    assert refused.get() == 0


def test_a_certificate_is_rotated_while_serving(start, tls_settings, pair, open_channel, other_authority, principals):
    running = start(tls_settings)
    before = open_channel(running)
    assert call(before, GET, principals.make_metadata("viewer")) is OK
    assert call(open_channel(running, ca=other_authority.cert), GET, principals.make_metadata("viewer")) is UNAVAILABLE
    pair.replace_by(other_authority.issue("localhost"))
    assert call(open_channel(running, ca=other_authority.cert), GET, principals.make_metadata("viewer")) is OK
    assert call(before, GET, principals.make_metadata("viewer")) is OK, "a connection that stands goes on"


def test_a_broken_pair_keeps_the_old_certificate_and_says_so(start, tls_settings, pair, open_channel, authority, principals, caplog):
    running = start(tls_settings)
    refused = running.server._metrics.file_refused.labels("certificate")._value
    key = pair.key.read_text()
    pair.cert.write_bytes(authority.issue("localhost").cert.read_bytes())  # of another key
    wait_until(lambda: refused.get() == 1, "the metric shows the broken pair")
    assert call(open_channel(running), GET, principals.make_metadata("viewer")) is OK
    pair.cert.unlink()
    assert call(open_channel(running, server_name="localhost"), GET, principals.make_metadata("viewer")) is OK
    messages = [record.getMessage() for record in caplog.records]
    assert any("are not a PEM certificate and its unencrypted key" in message for message in messages)
    assert not any(line in message for message in messages for line in key.splitlines()[1:-1])
    pair.replace_by(authority.issue("localhost"))
    wait_until(lambda: refused.get() == 0, "the good pair is in force")


# ---- safe defaults ----


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"host": "0.0.0.0"}, "SEDAC_CONTROL_HOST=0.0.0.0 is not loopback and there is no TLS; .* or set SEDAC_CONTROL_INSECURE=1"),
        ({"host": "::"}, "SEDAC_CONTROL_HOST=:: is not loopback and there is no TLS"),
        ({"host": "control.internal"}, "is not loopback"),
        ({"host": "0.0.0.0", "principals": "file"}, "tokens would travel in the clear"),
        ({"host": "0.0.0.0", "principals": "file", "insecure": True}, "tokens would travel in the clear"),
        ({"host": "0.0.0.0", "tls_cert": "cert", "tls_key": "key"}, "anybody could change the policy; set SEDAC_CONTROL_PRINCIPALS"),
        ({"tls_cert": "cert"}, "SEDAC_CONTROL_TLS_KEY is missing"),
        ({"tls_key": "key"}, "SEDAC_CONTROL_TLS_CERT is missing"),
        ({"tls_client_ca": "cert"}, "SEDAC_CONTROL_TLS_CLIENT_CA needs SEDAC_CONTROL_TLS_CERT"),
        ({"tls_cert": "key", "tls_key": "cert"}, "are not a PEM certificate and its unencrypted key"),
        ({"tls_cert": "cert", "tls_key": "missing"}, "can't be read: No such file"),
        ({"tls_cert": "cert", "tls_key": "key", "tls_client_ca": "key"}, "holds no PEM certificate"),
        ({"principals": "missing"}, "SEDAC_CONTROL_PRINCIPALS .* can't be read"),
    ],
)
def test_what_would_let_strangers_in_is_refused_at_start(settings, tmp_path, pair, principals, changes, complaint):
    files = {"cert": pair.cert, "key": pair.key, "file": principals.path, "missing": tmp_path / "missing"}
    with pytest.raises(ConfigError, match=complaint):
        RunningServer(settings.model_copy(update={name: files.get(value, value) for name, value in changes.items()}))


def test_another_host_is_fine_with_tls_and_principals(start, tls_settings, open_channel, principals):
    running = start(tls_settings.model_copy(update={"host": "0.0.0.0"}))
    assert call(open_channel(running), GET, principals.make_metadata("viewer")) is OK


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"name": "a", "role": "viewer", "token": "SECRET"}', "line 2: token"),
        ('{"name": "a", "role": "viewer", "token_sha256": "SECRET"}', "line 2: token_sha256"),
        ('{"name": "a SECRET", "role": "viewer", "token_sha256": "' + "1" * 64 + '"}', "line 2: name"),
        ('{"name": "a", "role": "SECRET", "token_sha256": "' + "1" * 64 + '"}', "line 2: role"),
        ('{"name": "a", "role": "viewer", "token_sha256": "' + "0" * 64 + '"}', "line 2: the same token as 'first'"),
        ('{"name": "first", "role": "admin", "token_sha256": "' + "1" * 64 + '"}', "line 2: 'first' has another role"),
        ('{"name": "a", "role": "viewer", "token_sha256": "' + "1" * 64 + '", "engine_id": "e"}', "engine_id belongs to role engine"),
        ('{"name": "a", "role": "viewer", "token_sha256": "' + "1" * 64 + '", "expires": "2030-01-01"}', "line 2: expires"),
        ('{"name": "a", "role": "viewer", "certificate": "x"}', "needs SEDAC_CONTROL_TLS_CLIENT_CA"),
        ('["SECRET"]', "line 2: the line"),
        ("SECRET", "line 2 is not a JSON object"),
        ("[" * 100_000, "line 2"),
    ],
)
def test_a_bad_line_is_named_and_never_quoted(tmp_path, line, complaint):
    path = tmp_path / "principals.jsonl"
    path.write_text('{"name": "first", "role": "viewer", "token_sha256": "' + "0" * 64 + f'"}}\n{line}\n')
    with pytest.raises(ConfigError, match=complaint) as refused:
        read_principals(path, certificates=False)
    assert "SECRET" not in str(refused.value)


# ---- clients ----


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
    from sedac.cli import app

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


# ---- no secrets ----


def test_no_token_and_no_key_is_in_a_log_an_error_or_a_metric(start, mtls_settings, open_channel, authority, principals, pair, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    running = start(mtls_settings)
    client_pair = authority.issue("ops")
    credentials = read_credentials(ca=authority.cert, client_cert=client_pair.cert, client_key=client_pair.key)
    channel = open_channel(running, client_cert=client_pair.cert, client_key=client_pair.key)
    texts = [repr(mtls_settings), repr(credentials), repr(channel)]
    tried = ["stolen-token-of-somebody", "sedac_" + "x" * 40]
    for path in METHODS:
        for name in ROLES:
            texts += find_error(channel, path, principals.make_metadata(name), timeout=0.3 if name in RULES[path] else 20)[1:]
        for token in tried:
            texts += find_error(channel, path, (("authorization", f"Bearer {token}"),))[1:]
            texts += find_error(channel, path, (("authorization", token),))[1:]
    old = principals.make_metadata("operator")
    principals.add("operator", "operator")
    texts += find_error(channel, GET, old)[1:]
    principals.add_line("broken", json.dumps({"name": "broken", "role": "viewer", "token": tried[0]}))
    pair.key.write_text(pair.key.read_text().replace("BEGIN", "begin"))
    refused = running.server._metrics.file_refused
    wait_until(lambda: refused.labels("principals")._value.get() == refused.labels("certificate")._value.get() == 1, "both files are refused")
    texts.append(generate_latest(running.server._metrics.registry).decode())
    texts += [record.getMessage() + str(record.exc_info) + str(record.args) for record in caplog.records]
    texts += capfd.readouterr()
    secrets = [*tried, *principals.tokens.values(), old[0][1].removeprefix("Bearer "), *map(digest_token, principals.tokens.values())]
    for file in (pair.key, client_pair.key):
        secrets += file.read_text().splitlines()[1:-1]
    assert any("refused" in text for text in texts), "something was logged"
    assert len(secrets) > 10
    assert not [secret for secret in secrets for text in texts if secret in text]


def test_denied_calls_are_logged_with_who_and_what_and_counted(start, settings, principals, caplog):
    running = start(settings.model_copy(update={"principals": principals.path}))
    denied = running.server._metrics.denied
    with grpc.insecure_channel(running.address) as channel:
        call(channel, UPDATE, principals.make_metadata("viewer"))
        call(channel, UPDATE)
        lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert lines[0].startswith(f"refused {UPDATE} from ipv4:127.0.0.1:")
        assert "token:viewer has role viewer" in lines[0]
        assert len(lines) == 2
        threads = [threading.Thread(target=lambda: [call(channel, GET) for _ in range(50)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert denied.labels("permission_denied")._value.get() == 1
    assert denied.labels("unauthenticated")._value.get() == 201
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines) < 120, "a flood is not logged line by line"
