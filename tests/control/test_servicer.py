"""Operators' calls, against a real server."""

from __future__ import annotations

import threading

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from sedac.control.v1 import control_pb2, control_pb2_grpc
from sedac.errors import ConfigError, PolicyInvalid, RevisionNotFound, StaleEtag
from sedac.policy import Checkpoint, Policy

from tests.control.conftest import FIRST, RunningServer


def _with_threshold(value: float) -> Policy:
    return Policy(enabled=True, checkpoints=(Checkpoint(layer=2, threshold=value),))


def test_no_policy_yet_says_how_to_get_one(client):
    with pytest.raises(RevisionNotFound, match="no engine has connected; start one, or set the first policy"):
        client.get_policy()


def test_each_change_is_a_revision_with_author_and_comment(client):
    first = client.update_policy(FIRST, comment="hello")
    second = client.update_policy(FIRST)
    assert (first.revision, first.author, first.comment) == (1, "tester", "hello")
    assert second.revision == 2
    assert second.etag != first.etag
    assert client.get_policy() == second
    assert client.get_policy(1) == first


def test_field_mask_changes_only_what_it_names(client):
    client.update_policy(FIRST)
    made = client.update_policy(Policy(enabled=False, phase="all"), fields=["phase"])
    assert made.enabled
    assert made.phase == control_pb2.PHASE_ALL
    assert [c.layer for c in made.checkpoints] == [2, 5]
    for path in ("revision", "etag", "speed"):
        with pytest.raises(PolicyInvalid, match=f"'{path}' can't be set; fields: enabled, probe_set"):
            client.update_policy(FIRST, fields=[path])


def test_validate_only_stores_nothing(client):
    client.update_policy(FIRST)
    assert client.update_policy(_with_threshold(0.9), validate_only=True).checkpoints[0].threshold == 0.9
    with pytest.raises(PolicyInvalid):
        client.update_policy(_with_threshold(-1), validate_only=True)
    assert client.get_policy().revision == 1


def test_bad_fields_are_all_named_and_nothing_changes(client):
    client.update_policy(FIRST)
    bad = Policy(
        checkpoints=(Checkpoint(layer=5, threshold=float("nan")), Checkpoint(layer=2, threshold=float("inf")), Checkpoint(layer=-1, threshold=-2))
    )
    with pytest.raises(PolicyInvalid) as refused:
        client.update_policy(bad)
    assert [v.field for v in refused.value.violations] == [
        "checkpoints[0].threshold", "checkpoints[1].layer", "checkpoints[1].threshold", "checkpoints[2].layer", "checkpoints[2].threshold",
    ]  # fmt: skip
    assert client.get_policy().revision == 1


def test_refusals_carry_rich_details(server):
    with grpc.insecure_channel(server.address) as channel:
        stub = control_pb2_grpc.ControlStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.UpdatePolicy(control_pb2.UpdatePolicyRequest(policy=control_pb2.Policy(checkpoints=[control_pb2.Checkpoint(layer=1, threshold=-1)])))
        with pytest.raises(grpc.RpcError) as wrong_enum:
            stub.UpdatePolicy(control_pb2.UpdatePolicyRequest(policy=control_pb2.Policy(phase=7)))
        with pytest.raises(grpc.RpcError) as wrong_name:
            stub.GetPolicy(control_pb2.GetPolicyRequest(name="policies/other"))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    details = rpc_status.from_call(refused.value).details
    assert details[0].Unpack(info)
    assert (info.reason, info.domain) == ("PolicyInvalid", "sedac")
    assert details[1].Unpack(bad)
    assert bad.field_violations[0].field == "checkpoints[0].threshold"
    assert wrong_enum.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert wrong_name.value.code() == grpc.StatusCode.NOT_FOUND


def test_thresholds_of_layers_without_a_probe_are_refused_before_they_are_stored(client, make_engine):
    make_engine().pushes.get(timeout=5)
    with pytest.raises(PolicyInvalid, match=r"checkpoints\[0\].layer: 3 has no probe attached \(attached: 2, 5, 8\)"):
        client.update_policy(Policy(checkpoints=(Checkpoint(layer=3, threshold=1),)))
    with pytest.raises(PolicyInvalid, match="'other' is not loaded; the engine has 'demo'"):
        client.update_policy(Policy(probe_set="other"))
    assert client.get_policy().revision == 1


def test_two_writers_with_one_etag_exactly_one_wins(client):
    for round_number in range(1, 26):
        etag = client.update_policy(FIRST).etag
        results, barrier = [], threading.Barrier(4)

        def write(value, etag=etag, results=results, barrier=barrier):
            barrier.wait()
            try:
                results.append(client.update_policy(_with_threshold(value), etag=etag).revision)
            except StaleEtag:
                results.append(None)

        threads = [threading.Thread(target=write, args=(i / 10,)) for i in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert sorted(results, key=str)[:-1].count(None) + results.count(None) >= 3
        assert [r for r in results if r] == [2 * round_number]


def test_a_repeated_request_id_returns_the_first_answer(client):
    first = client.update_policy(FIRST, request_id="abc")
    client.update_policy(_with_threshold(0.3))
    assert client.update_policy(FIRST, request_id="abc") == first
    assert client.get_policy().revision == 2


def test_rollback_brings_content_back_under_a_new_number(client):
    client.update_policy(FIRST)
    client.update_policy(_with_threshold(0.75))
    made = client.rollback(1)
    assert (made.revision, made.comment, [c.threshold for c in made.checkpoints]) == (3, "rollback to revision 1", [0.5, 0.25])
    with pytest.raises(RevisionNotFound, match="revision 9 does not exist; the newest is 3"):
        client.rollback(9)


def test_revisions_are_listed_in_pages(client, server):
    for i in range(7):
        client.update_policy(_with_threshold(i))
    with grpc.insecure_channel(server.address) as channel:
        stub = control_pb2_grpc.ControlStub(channel)
        page = stub.ListPolicyRevisions(control_pb2.ListPolicyRevisionsRequest(page_size=3))
        assert [p.revision for p in page.policies] == [7, 6, 5]
        page = stub.ListPolicyRevisions(control_pb2.ListPolicyRevisionsRequest(page_size=3, page_token=page.next_page_token))
        assert [p.revision for p in page.policies] == [4, 3, 2]
        for bad in ({"page_size": -1}, {"page_size": 1001}, {"page_token": "x"}):
            with pytest.raises(grpc.RpcError, match="INVALID_ARGUMENT"):
                stub.ListPolicyRevisions(control_pb2.ListPolicyRevisionsRequest(**bad))
    assert [p.revision for p in client.list_revisions()] == [7, 6, 5, 4, 3, 2, 1]


def test_watch_sends_now_and_on_every_change(client):
    client.update_policy(FIRST)
    watch = client.watch_status(60)
    assert next(watch).policy.revision == 1
    client.update_policy(FIRST)
    assert next(watch).policy.revision == 2


def test_health_and_reflection_answer(server):
    with grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "sedac.control.v1.Control", "sedac.control.v1.Discovery"):
            assert health.Check(health_pb2.HealthCheckRequest(service=service)).status == health_pb2.HealthCheckResponse.SERVING
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
        assert {"sedac.control.v1.Control", "sedac.control.v1.Discovery"} <= {s.name for s in answer.list_services_response.service}


def test_a_second_server_on_the_port_fails_with_the_remedy(server, settings, tmp_path):
    taken = settings.model_copy(update={"port": server.server.port, "database": tmp_path / "other.sqlite3"})
    with pytest.raises(ConfigError, match="change SEDAC_CONTROL_PORT"):
        RunningServer(taken)


def test_oversized_messages_are_refused(server):
    with grpc.insecure_channel(server.address) as channel:
        request = control_pb2.UpdatePolicyRequest(policy=control_pb2.Policy(comment="x" * (2 << 20)))
        with pytest.raises(grpc.RpcError, match="RESOURCE_EXHAUSTED"):
            control_pb2_grpc.ControlStub(channel).UpdatePolicy(request)
