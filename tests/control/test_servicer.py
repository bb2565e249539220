"""Operators' calls, against a real server."""

from __future__ import annotations

import dataclasses
import threading
import time

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sedac.client.client import ControlClient
from sedac.contract import wire
from sedac.contract.v1 import control_pb2, control_pb2_grpc
from sedac.errors import PolicyInvalid, RequestIdReused, RevisionNotFound, StaleEtag
from sedac.policy.model import Adaptation, Checkpoint, Policy, Speculation, Tier

from testing.control.engines import FIRST
from testing.strategies import valid_policies


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
        with pytest.raises(PolicyInvalid, match=f"'{path}' can't be set; fields: enabled, probe_set, checkpoints"):
            client.update_policy(FIRST, fields=[path])


def test_field_mask_reaches_into_adaptation_and_takes_lists_whole(client):
    rates = (0.2, 0.4)
    client.update_policy(dataclasses.replace(FIRST, adaptation=Adaptation(enabled=True, target_exit_rates=rates, alpha=0.5)))
    client.update_policy(Policy(adaptation=Adaptation(frozen=True)), fields=["adaptation.frozen"])
    made = wire.policy_from_proto(client.update_policy(Policy(adaptation=Adaptation(generation=3)), fields=["adaptation.generation"]))
    assert made == dataclasses.replace(FIRST, adaptation=Adaptation(enabled=True, frozen=True, target_exit_rates=rates, alpha=0.5, generation=3))
    tiers = (Tier(name="mine", threshold_scale=0.0), Tier(name="yours"))
    made = wire.policy_from_proto(client.update_policy(Policy(tiers=tiers, default_tier="mine"), fields=["tiers", "default_tier"]))
    assert (made.tiers, made.default_tier, made.adaptation.generation) == (tiers, "mine", 3)
    assert not client.update_policy(Policy(), fields=["adaptation", "adaptation.alpha"]).adaptation.enabled
    for path in ("adaptation.speed", "tiers.name", "adaptation."):
        with pytest.raises(PolicyInvalid, match=f"'{path}' can't be set; .* as audit.share"):
            client.update_policy(FIRST, fields=[path])


def test_field_mask_reaches_into_speculation(client):
    client.update_policy(dataclasses.replace(FIRST, speculation=Speculation(max_tokens=3, min_confidence=0.5, tiers=("exact",))))
    made = wire.policy_from_proto(client.update_policy(Policy(speculation=Speculation(enabled=False)), fields=["speculation.enabled"]))
    assert made.speculation == Speculation(enabled=False, max_tokens=3, min_confidence=0.5, tiers=("exact",))
    fields = ["speculation.min_confidence", "speculation.tiers", "speculation.enabled"]
    made = wire.policy_from_proto(client.update_policy(Policy(), fields=fields))
    assert made == dataclasses.replace(FIRST, speculation=Speculation(max_tokens=3)), "unset is none, and empty is all"
    with pytest.raises(PolicyInvalid, match=r"'speculation\.speed' can't be set; .* as audit\.share"):
        client.update_policy(FIRST, fields=["speculation.speed"])


def test_drafts_are_checked_against_every_engine_that_has_one(client, make_engine):
    make_engine("e1").pushes.get(timeout=5)
    assert client.update_policy(Policy(speculation=Speculation(max_tokens=16)), fields=["speculation"]).speculation.max_tokens == 16
    client.update_policy(Policy(speculation=Speculation()), fields=["speculation"])
    make_engine("e2", draft="adapter", max_draft_tokens=4).pushes.get(timeout=5)
    with pytest.raises(PolicyInvalid, match=r"speculation.max_tokens: 5 is over 4, for which this engine was started; .* \(engine e2\)"):
        client.update_policy(Policy(speculation=Speculation(max_tokens=5)), fields=["speculation"])
    assert client.update_policy(Policy(speculation=Speculation(max_tokens=4)), fields=["speculation"]).speculation.max_tokens == 4
    with pytest.raises(PolicyInvalid, match=r"speculation.tiers\[0\]: 'night' is no tier of this policy, it has exact, balanced"):
        client.update_policy(Policy(speculation=Speculation(tiers=("night",))), fields=["speculation.tiers"])


@given(st.lists(valid_policies(), min_size=1, max_size=3))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_whole_policies_are_stored_and_read_as_they_were_sent(client, policies):
    for policy in policies:
        made = client.update_policy(policy)
        assert wire.policy_from_proto(client.get_policy(made.revision)) == policy


def test_levels_are_checked_against_every_engine(client, make_engine):
    make_engine("e1", levels=["full", "skip", "width-25"]).pushes.get(timeout=5)
    policy = dataclasses.replace(FIRST, tiers=(Tier(name="balanced", floor="width-25"),))
    assert client.update_policy(policy).tiers[0].floor == "width-25"
    make_engine("e2")
    client.wait_until_synced(2, 5)
    with pytest.raises(PolicyInvalid, match=r"tiers\[0\].level: 'width-50' is not a level of this engine; it has full, skip \(engine e2\)"):
        client.update_policy(dataclasses.replace(FIRST, tiers=(Tier(name="balanced", level="width-50"),)))


def test_validate_only_stores_nothing(client):
    client.update_policy(FIRST)
    assert client.update_policy(_with_threshold(0.9), validate_only=True).checkpoints[0].threshold == 0.9
    with pytest.raises(PolicyInvalid):
        client.update_policy(_with_threshold(-1), validate_only=True)
    with pytest.raises(StaleEtag, match="read the policy again"):
        client.update_policy(_with_threshold(0.9), etag="old", validate_only=True)
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
    with pytest.raises(PolicyInvalid, match=r"'other' is neither attached \('demo' is\) nor uploaded"):
        client.update_policy(Policy(probe_set="other"))
    assert client.get_policy().revision == 1


def test_an_engine_that_is_gone_is_not_asked(client, make_engine):
    make_engine("e1").pushes.get(timeout=5)
    gone = make_engine("e2", layers=[2, 5])
    client.wait_until_synced(1, 5)
    only_e1_fits = Policy(checkpoints=(Checkpoint(layer=8, threshold=1),))
    with pytest.raises(PolicyInvalid, match=r"attached: 2, 5\).*\(engine e2\)"):
        client.update_policy(only_e1_fits)
    gone.close()
    deadline = time.monotonic() + 5
    while all(e.state != control_pb2.ENGINE_STATE_STALE for e in client.get_status().engines) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert client.update_policy(only_e1_fits).revision == 2


def test_an_engine_that_does_not_fit_does_not_keep_the_others_from_being_switched_off(client, make_engine):
    make_engine().pushes.get(timeout=5)
    misfit = make_engine("e2", layers=[2])
    misfit.refuse = "checkpoints[1].layer: 5 has no probe attached"
    client.update_policy(Policy(enabled=False), fields=["enabled"])
    assert not client.get_policy().enabled
    with pytest.raises(PolicyInvalid) as refused:
        client.update_policy(Policy(checkpoints=(Checkpoint(layer=2, threshold=1), Checkpoint(layer=8, threshold=1))), fields=["checkpoints"])
    (violation,) = refused.value.violations
    assert violation.field == "checkpoints[1].layer"
    assert violation.description.endswith("(engine e2)"), "what was broken before is not the change's fault; what it breaks names the engine"


def test_an_update_without_a_policy_is_refused(client, server):
    client.update_policy(FIRST)
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError, match="policy: is missing; send the fields to set"):
        control_pb2_grpc.ControlStub(channel).UpdatePolicy(control_pb2.UpdatePolicyRequest())
    assert client.get_policy().enabled


def test_an_error_about_many_long_fields_still_arrives(client):
    bad = Policy(probe_set="x" * 200, checkpoints=tuple(Checkpoint(layer=i, threshold=-1) for i in range(256)))
    with pytest.raises(PolicyInvalid, match=r"checkpoints\[0\].threshold: -1.0 is not a finite number"):
        client.update_policy(bad)


@pytest.mark.parametrize("knobs", [{"comment": "x" * 1025}, {"request_id": "x" * 129}])
def test_texts_have_limits(client, knobs):
    with pytest.raises(PolicyInvalid, match=r"[0-9]+ characters; at most [0-9]+"):
        client.update_policy(FIRST, **knobs)


def test_authors_may_have_any_name(server):
    with ControlClient(server.address, author="Zoë 100% [/]") as client:
        assert client.update_policy(FIRST).author == "Zoë 100% [/]"
    with ControlClient(server.address, author="x" * 129) as client, pytest.raises(PolicyInvalid, match="129 characters; at most 128"):
        client.update_policy(FIRST)
    with grpc.insecure_channel(server.address) as channel:
        made = control_pb2_grpc.ControlStub(channel).UpdatePolicy(control_pb2.UpdatePolicyRequest(policy=control_pb2.Policy()))
    assert made.author.startswith("ipv4:127.0.0.1:"), "who does not say a name is known by the peer's address"


def test_masked_updates_of_different_fields_lose_nothing(client):
    client.update_policy(FIRST)
    for round_number in range(1, 21):
        wanted = {"sensitivity": float(round_number % 10), "decay": round_number / 100, "allow_overrides": bool(round_number % 2)}
        barrier = threading.Barrier(len(wanted))

        def write(name, value, barrier=barrier):
            barrier.wait()
            client.update_policy(dataclasses.replace(FIRST, **{name: value}), fields=[name])

        threads = [threading.Thread(target=write, args=knob) for knob in wanted.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        made = wire.policy_from_proto(client.get_policy())
        assert {name: getattr(made, name) for name in wanted} == wanted


def test_a_change_whose_caller_gives_up_is_announced_or_not_made(client, server, make_engine):
    engine = make_engine()
    engine.pushes.get(timeout=5)
    with grpc.insecure_channel(server.address) as channel:
        update = control_pb2_grpc.ControlStub(channel).UpdatePolicy
        for _ in range(20):
            update.future(control_pb2.UpdatePolicyRequest(policy=control_pb2.Policy(enabled=True))).cancel()
    time.sleep(0.3)
    stored = next(iter(client.list_revisions())).revision
    assert client.get_policy().revision == stored
    client.wait_until_synced(stored, 5)


def test_two_writers_with_one_etag_exactly_one_wins(client):
    for round_number in range(1, 26):
        etag = client.update_policy(FIRST).etag
        results, barrier = [], threading.Barrier(4)

        def write(value, etag=etag, results=results, barrier=barrier):
            barrier.wait()
            try:
                results.append(client.update_policy(_with_threshold(value), etag=etag).revision)
            except StaleEtag:
                results.append(0)

        threads = [threading.Thread(target=write, args=(i / 10,)) for i in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert sorted(results) == [0, 0, 0, 2 * round_number]


def test_a_repeated_request_id_returns_the_first_answer(client):
    first = client.update_policy(FIRST, request_id="abc")
    client.update_policy(_with_threshold(0.3))
    assert client.update_policy(FIRST, request_id="abc") == first
    assert client.get_policy().revision == 2
    rolled_back = client.rollback(1, request_id="def")
    assert client.rollback(1, request_id="def") == rolled_back
    assert client.get_policy().revision == 3


def test_a_repeat_is_answered_even_where_it_would_be_refused_by_now(client):
    etag = client.update_policy(FIRST).etag
    made = client.update_policy(_with_threshold(0.3), etag=etag, request_id="abc")
    client.update_policy(FIRST)
    assert client.update_policy(_with_threshold(0.3), etag=etag, request_id="abc") == made


def test_a_request_id_with_another_request_is_refused(client):
    client.update_policy(FIRST, request_id="abc")
    with pytest.raises(RequestIdReused, match="'abc' made revision 1 from another request; send a new one"):
        client.update_policy(_with_threshold(0.3), request_id="abc")
    with pytest.raises(RequestIdReused):
        client.rollback(1, request_id="abc")
    assert client.get_policy().revision == 1


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
        for bad in ({"page_size": -1}, {"page_size": 1001}, {"page_token": "x"}, {"page_token": "²"}, {"page_token": "9" * 30}):
            with pytest.raises(grpc.RpcError, match="INVALID_ARGUMENT"):
                stub.ListPolicyRevisions(control_pb2.ListPolicyRevisionsRequest(**bad))
    assert [p.revision for p in client.list_revisions()] == [7, 6, 5, 4, 3, 2, 1]


def test_watch_sends_now_and_on_every_change(client):
    client.update_policy(FIRST)
    watch = client.watch_status(60)
    assert next(watch).policy.revision == 1
    client.update_policy(FIRST)
    assert next(watch).policy.revision == 2
    watch.close()


def test_watch_sends_once_per_interval_and_checks_it(client):
    watch = client.watch_status(0.1)
    assert [next(watch).policy.revision for _ in range(3)] == [0, 0, 0]
    watch.close()
    for interval in (0.05, 61, -1, float("nan")):
        with pytest.raises(PolicyInvalid, match=r"interval_seconds: .* is outside 0.1..60"):
            next(client.watch_status(interval))


def test_a_watcher_that_does_not_read_holds_nobody_up(client, server, make_engine):
    with grpc.insecure_channel(server.address) as channel:
        stuck = control_pb2_grpc.ControlStub(channel).WatchStatus(control_pb2.WatchStatusRequest(interval_seconds=60))
        make_engine().pushes.get(timeout=5)
        for i in range(150):
            client.update_policy(_with_threshold(i), comment="x" * 1000)
        client.wait_until_synced(151, 5)
        revisions = []
        while not revisions or revisions[-1] < 151:
            revisions.append(next(stuck).policy.revision)
        assert revisions == sorted(revisions)
        stuck.cancel()


def test_oversized_messages_are_refused(server):
    with grpc.insecure_channel(server.address) as channel:
        request = control_pb2.UpdatePolicyRequest(policy=control_pb2.Policy(comment="x" * (2 << 20)))
        with pytest.raises(grpc.RpcError, match="RESOURCE_EXHAUSTED"):
            control_pb2_grpc.ControlStub(channel).UpdatePolicy(request)
