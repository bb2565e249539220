"""The audit log: an entry with every change and in its transaction, read in pages by administrators."""

from __future__ import annotations

import datetime
import json
import sqlite3

import grpc
import pytest
from sedac.client.client import ControlClient
from sedac.contract import wire
from sedac.contract.v1 import audit_log_pb2_grpc, control_pb2
from sedac.contract.v1.audit_log_pb2 import ListAuditEntriesRequest
from sedac.control.access.audit_log import AuditLogStore
from sedac.control.access.auth import Caller
from sedac.control.base.database import Database
from sedac.control.revisions.store import Store
from sedac.errors import StaleEtag, StoreFailed
from sedac.policy.model import Policy

from testing.control.engines import FIRST

CALLER = Caller(principal="token:alice", author="Alice", peer="ipv4:192.0.2.1:5")
T0 = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


@pytest.fixture
def database(tmp_path):
    database = Database(tmp_path / "control.sqlite3")
    yield database
    database.close()


@pytest.fixture
def audit_log(database) -> AuditLogStore:
    return AuditLogStore(database, now=lambda: T0)


@pytest.fixture
def read(server):
    channel = grpc.insecure_channel(server.address)
    stub = audit_log_pb2_grpc.AuditLogStub(channel)
    yield lambda **fields: stub.ListAuditEntries(ListAuditEntriesRequest(**fields), timeout=20)
    channel.close()


def test_an_entry_says_who_did_what_to_what(audit_log):
    before, after = control_pb2.Policy(comment="before"), control_pb2.Policy(comment="after", enabled=True)
    audit_log.append("UpdatePolicy", "policies/default", before, after, "because", caller=CALLER)
    audit_log.append("DeleteProbeSet", "probe-sets/demo", before, None, caller=CALLER)
    deleted, updated = audit_log.list(before=None, limit=10)
    assert (updated.number, updated.principal, updated.author, updated.peer) == (1, "token:alice", "Alice", "ipv4:192.0.2.1:5")
    assert (updated.action, updated.resource, updated.comment) == ("UpdatePolicy", "policies/default", "because")
    assert json.loads(updated.before_json) == {"comment": "before"}
    assert json.loads(updated.after_json) == {"comment": "after", "enabled": True}
    assert updated.time.ToDatetime(datetime.UTC) == T0
    assert deleted.after_json == ""


def test_an_entry_and_its_change_are_one_act(database, audit_log):
    store = Store(database)

    class Interrupted(Exception):
        pass

    def change_and_die() -> None:
        with database.transaction():
            store.append_audited(audit_log, Policy(), action="UpdatePolicy", caller=CALLER)
            raise Interrupted

    with pytest.raises(Interrupted):
        change_and_die()
    assert store.find_newest() is None
    assert audit_log.list(before=None, limit=10) == []


def test_a_change_that_is_refused_leaves_no_entry(database, audit_log):
    store = Store(database)
    store.append_audited(audit_log, Policy(), action="UpdatePolicy", caller=CALLER)
    with pytest.raises(StaleEtag):
        store.append_audited(audit_log, Policy(), action="UpdatePolicy", caller=CALLER, expected_etag="stale")
    assert len(audit_log.list(before=None, limit=10)) == 1


def test_no_change_without_its_entry(database, audit_log):
    """Where the entry can't be written, the change is not made either."""
    store = Store(database)
    database.execute("CREATE TRIGGER full BEFORE INSERT ON audit_log BEGIN SELECT RAISE(ABORT, 'disk full'); END")
    with pytest.raises(StoreFailed):
        store.append_audited(audit_log, Policy(), action="UpdatePolicy", caller=CALLER)
    assert store.find_newest() is None


def test_a_repeated_request_is_one_entry(database, audit_log):
    store = Store(database)
    made = [
        store.append_audited(audit_log, Policy(), action="UpdatePolicy", caller=CALLER, request_id="r", fingerprint="f").revision for _ in range(2)
    ]
    assert made == [1, 1]
    assert len(audit_log.list(before=None, limit=10)) == 1


def test_entries_outlive_the_process_and_their_numbers_never_come_again(tmp_path):
    path = tmp_path / "control.sqlite3"
    for _ in range(3):
        database = Database(path)
        AuditLogStore(database).append("UpdatePolicy", "policies/default", None, None, caller=CALLER)
        database.close()
    connection = sqlite3.connect(path)
    connection.execute("DELETE FROM audit_log WHERE number = 3")  # somebody tampers with the file
    connection.commit()
    connection.close()
    database = Database(path)
    audit_log = AuditLogStore(database)
    audit_log.append("UpdatePolicy", "policies/default", None, None, caller=CALLER)
    assert [entry.number for entry in audit_log.list(before=None, limit=10)] == [4, 2, 1], "the gap shows"
    database.close()


def test_updates_and_rollbacks_are_in_the_log(client, read):
    client.update_policy(FIRST, comment="first")
    client.update_policy(Policy(enabled=False), fields=["enabled"], comment="stop")
    client.rollback(1, request_id="r1")
    client.rollback(1, request_id="r1")
    client.update_policy(Policy(enabled=False), fields=["enabled"], validate_only=True)
    rolled_back, stopped, first = read().entries
    assert [e.action for e in (first, stopped, rolled_back)] == ["UpdatePolicy", "UpdatePolicy", "RollbackPolicy"]
    assert {e.resource for e in (first, stopped, rolled_back)} == {"policies/default"}
    assert (first.principal, first.author, first.comment, first.before_json) == ("-", "tester", "first", "")
    assert first.peer.startswith("ipv4:127.0.0.1:")
    before, after = json.loads(stopped.before_json), json.loads(stopped.after_json)
    assert (before["enabled"], after.get("enabled", False)) == (True, False)
    assert (before["revision"], after["revision"]) == ("1", "2")
    assert json.loads(rolled_back.after_json)["checkpoints"] == before["checkpoints"]
    assert rolled_back.comment == "rollback to revision 1"


def test_the_first_policy_of_an_engine_is_in_the_log(make_engine, read):
    make_engine("e7").pushes.get(timeout=20)
    (entry,) = read().entries
    assert (entry.action, entry.author, entry.before_json) == ("Follow", "engine e7", "")
    assert json.loads(entry.after_json)["checkpoints"][0]["layer"] == FIRST.checkpoints[0].layer


def test_entries_come_in_pages_newest_first(server, read):
    for number in range(1, 8):
        _append(server, f"change {number}")
    pages, token = [], ""
    while True:
        page = read(page_size=3, page_token=token)
        pages.append([entry.number for entry in page.entries])
        token = page.next_page_token
        if not token:
            break
    assert pages == [[7, 6, 5], [4, 3, 2], [1]]


def test_a_page_of_long_entries_fits_a_message(server, read):
    long = control_pb2.Policy(comment="x" * 400_000)
    for _ in range(30):
        _append(server, "long", after=long)
    seen, token = [], ""
    while True:
        page = read(page_size=1000, page_token=token)
        assert page.ByteSize() < 2 << 20
        seen += [entry.number for entry in page.entries]
        token = page.next_page_token
        if not token:
            break
    assert seen == list(range(30, 0, -1))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [({"page_size": 1001}, "page_size: 1001 is outside 0..1000"), ({"page_size": -1}, "page_size: -1"), ({"page_token": "x"}, "page_token: 'x'")],
)
def test_a_bad_page_is_refused(read, fields, complaint):
    with pytest.raises(grpc.RpcError) as refused:
        read(**fields)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert complaint in refused.value.details()


def test_an_empty_log_is_an_empty_page(read):
    answer = read()
    assert (len(answer.entries), answer.next_page_token) == (0, "")


def test_an_author_that_is_too_long_is_refused(server):
    with ControlClient(server.address, author="x" * 200) as client, pytest.raises(Exception, match="200 characters; at most 128"):
        client.update_policy(FIRST)


def _append(server, comment: str, after=None) -> None:
    audit_log = AuditLogStore(server.server._database)
    audit_log.append("UpdatePolicy", "policies/default", None, after or wire.policy_to_proto(FIRST), comment, caller=CALLER)
