"""Who gets in: roles and tokens, TLS and mTLS with an authority of this process."""

from __future__ import annotations

import queue
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sedac.contract import wire
from sedac.contract.v1 import audit_log_pb2_grpc, control_pb2, control_pb2_grpc
from sedac.contract.v1.audit_log_pb2 import ListAuditEntriesRequest
from sedac.control.access.auth import OPEN, RULES
from sedac.control.access.principals import digest_token
from sedac.control.base.settings import ControlSettings

from testing.control.access import (
    DENIED,
    DOWNLOAD,
    FOLLOW,
    GET,
    METHODS,
    OK,
    REFLECT,
    ROLES,
    UNAUTHENTICATED,
    UNAVAILABLE,
    UPDATE,
    UPDATE_MESSAGE,
    PrincipalsFile,
    call,
    find_error,
)
from testing.control.engines import FIRST
from testing.control.running import RunningServer


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
    assert call(connect("gone"), GET) is UNAUTHENTICATED, "its line has expired, not its certificate"
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
