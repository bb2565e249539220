"""Tokens, principals and certificates that change while the service runs."""

from __future__ import annotations

import grpc
import pytest
from sedac.contract.credentials import read_credentials
from sedac.contract.v1 import control_pb2, control_pb2_grpc

from testing.control.access import GET, OK, UNAUTHENTICATED, UNAVAILABLE, call, find_error, wait_until


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
    watch = control_pb2_grpc.ControlStub(channel).WatchStatus(
        control_pb2.WatchStatusRequest(), metadata=principals.make_metadata("viewer"), timeout=30
    )
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
