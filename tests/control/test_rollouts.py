"""Roll-outs: a good candidate is promoted, a bad one goes back, and without evidence nothing is promoted; whoever restarts."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import re
import threading
import time

import grpc
import pytest
from sedac.client.client import ControlClient
from sedac.contract import wire
from sedac.contract.v1 import audit_log_pb2, audit_log_pb2_grpc, control_pb2, rollouts_pb2, rollouts_pb2_grpc
from sedac.policy.model import Audit, Checkpoint, Policy

from testing.control.engines import FIRST
from testing.control.measuring import Measured, MeasuringEngine, wait_for
from testing.control.running import RunningServer

BASE = dataclasses.replace(FIRST, audit=Audit(share=0.5))
CANDIDATE = dataclasses.replace(BASE, checkpoints=(Checkpoint(layer=5, threshold=0.75),))
BOUNDS = {"max_mismatch": 0.05, "max_nll_difference": 0.05, "max_latency_ratio": 1.5, "max_error_share": 0.1}
PROGRESSING, PAUSED = rollouts_pb2.ROLLOUT_STATE_PROGRESSING, rollouts_pb2.ROLLOUT_STATE_PAUSED
PROMOTED, ABORTED = rollouts_pb2.ROLLOUT_STATE_PROMOTED, rollouts_pb2.ROLLOUT_STATE_ABORTED
INTERVAL = 0.4


@pytest.fixture
def stub(server):
    with grpc.insecure_channel(server.address) as channel:
        yield rollouts_pb2_grpc.RolloutsStub(channel)


@pytest.fixture
def make_engine(server):
    engines = []

    def make(*args, address=server.address, **kwargs):
        engines.append(MeasuringEngine(address, *args, **{"initial": BASE, **kwargs}))
        wait_for(lambda: engines[-1].counts, "the engine's first policy")
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def _start(stub, candidate: Policy | None = CANDIDATE, **terms) -> rollouts_pb2.Rollout:
    terms = {"shares": [0.1, 0.5], "interval_seconds": INTERVAL, "min_requests": 5, "bounds": BOUNDS, **terms}
    return stub.StartRollout(rollouts_pb2.StartRolloutRequest(policy=candidate and wire.policy_to_proto(candidate), **terms))


def _get(stub, name: str = "") -> rollouts_pb2.Rollout:
    return stub.GetRollout(rollouts_pb2.GetRolloutRequest(name=name))


def _wait(stub, *states: int) -> rollouts_pb2.Rollout:
    wait_for(lambda: _get(stub).state in states, f"states {states}; it is {_get(stub).state}")
    return _get(stub)


def _change(stub, what: str, **fields) -> rollouts_pb2.Rollout:
    return getattr(stub, f"{what}Rollout")(rollouts_pb2.ChangeRolloutRequest(**fields))


def _drain(engine) -> list[control_pb2.PolicyPush]:
    return [engine.pushes.get_nowait() for _ in range(engine.pushes.qsize())]


def test_a_good_candidate_is_promoted_through_all_steps(stub, client, server, make_engine):
    engine = make_engine()
    started = _start(stub, comment="try layer 5 alone")
    assert (started.name, started.state, started.base_revision, started.author) == ("rollouts/1", PROGRESSING, 1, started.author)
    over = _wait(stub, PROMOTED, PAUSED, ABORTED)
    assert over.state == PROMOTED, over.reason
    assert (over.promoted_revision, over.step) == (2, 1)
    assert {e.side for e in over.evidence} == {1, 2}, "of both sides, at the last analysis"
    policy = client.get_policy()
    assert (policy.revision, policy.author) == (2, "rollout")
    assert wire.policy_from_proto(policy) == CANDIDATE
    client.wait_until_synced(2, 10)
    pushes = _drain(engine)
    assert [(p.policy.revision, p.candidate.rollout, p.candidate.share) for p in pushes] == [(1, 0, 0), (1, 1, 0.1), (1, 1, 0.5), (2, 0, 0)]
    assert wire.policy_from_proto(pushes[1].candidate.policy) == CANDIDATE
    with grpc.insecure_channel(server.address) as channel:
        entries = audit_log_pb2_grpc.AuditLogStub(channel).ListAuditEntries(audit_log_pb2.ListAuditEntriesRequest()).entries
    assert [(e.action, e.resource, e.principal) for e in entries][:4] == [
        ("PromoteRollout", "rollouts/1", "rollout"),
        ("PromoteRollout", "policies/default", "rollout"),
        ("AdvanceRollout", "rollouts/1", "rollout"),
        ("StartRollout", "rollouts/1", "-"),
    ]
    value = server.server._metrics.registry.get_sample_value
    assert value("sedac_control_rollout_state", {"state": "promoted"}) == 1
    assert value("sedac_control_rollout_analyses_total", {"verdict": "pass"}) == 2
    assert value("sedac_control_rollout_share") == 0


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Measured(mismatch=300), "mismatch is over 0.[0-9]+, its bound is 0.05"),
        (Measured(nll_difference=400), "nll difference is over 0.[0-9]+, its bound is 0.05"),
        (Measured(token_seconds=0.08), r"seconds per token are over [0-9.]+ times those of the policy in force"),
        (Measured(error_every=2), "[0-9]+ of [0-9]+ requests ended in an error"),
    ],
    ids=["mismatch", "nll", "latency", "errors"],
)
def test_a_breach_goes_back_within_one_interval(stub, client, make_engine, bad, reason):
    engine = make_engine(candidate=dataclasses.replace(bad, rate=50))
    _start(stub, min_requests=1000000)
    asked = time.monotonic()
    over = _wait(stub, PROMOTED, PAUSED, ABORTED)
    print(f"aborted {time.monotonic() - asked:.2f} s after the start, interval {INTERVAL} s")
    assert over.state == ABORTED, over.reason
    assert over.step == 0
    assert re.search(reason, over.reason), over.reason
    wait_for(lambda: engine.in_force[2] == 0, "the engine to be given back")
    assert client.get_policy().revision == 1


def _break(evidence, name, value):
    setattr(evidence.token_seconds, name, value)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda e: _break(e, "sum", math.nan), "engine e1, tier balanced: token_seconds: sum nan"),
        (lambda e: _break(e, "sum_squares", math.inf), "not finite"),
        (lambda e: _break(e, "count", -3), "negative"),
        (lambda e: e.mismatch_counts.update({1001: 2}), "1001 thousandths is outside"),
        (lambda e: setattr(e, "num_requests", -1), "num_requests is -1"),
        (lambda e: e.Clear(), "no evidence of the candidate"),
        (lambda e: (e.mismatch_counts.clear(), e.nll_difference_counts.clear()), "too few audited answers"),
        (lambda e: setattr(e, "rollout", 77), "no evidence of the candidate"),
    ],
    ids=["nan", "infinite", "negative", "outside", "negative count", "empty", "not audited", "other roll-out"],
)
def test_broken_or_missing_evidence_pauses(stub, client, make_engine, harm, reason):
    make_engine().poison = harm
    _start(stub)
    over = _wait(stub, PROMOTED, PAUSED, ABORTED)
    assert over.state == PAUSED
    assert reason in over.reason
    assert client.get_policy().revision == 1


def test_too_few_requests_pause_and_more_of_them_go_on_after_a_resume(stub, make_engine):
    engine = make_engine(candidate=Measured(rate=0))
    engine.counts[2] = 0
    _start(stub)
    assert "no request has finished" in _wait(stub, PAUSED).reason
    engine.sides[2].rate = 5
    assert _change(stub, "Resume", comment="there is traffic now").state == PROGRESSING
    assert _wait(stub, PROMOTED, ABORTED).state == PROMOTED


def _fail():
    raise RuntimeError("the books are on fire")


async def _fail_later():
    _fail()


async def _hang():
    await asyncio.sleep(3600)


@pytest.mark.parametrize(
    ("read", "reason"), [(_fail_later, "the books are on fire"), (_fail, "the books are on fire"), (_hang, "took longer than 0.2 s")]
)
def test_evidence_that_cannot_be_read_pauses(server, stub, make_engine, read, reason):
    make_engine()
    driver = server.server._rollout_driver
    driver.read, driver.read_seconds = read, 0.2
    _start(stub)
    over = _wait(stub, PROMOTED, PAUSED, ABORTED)
    assert (over.state, reason in over.reason) == (PAUSED, True), over.reason


def test_slow_evidence_keeps_nobody_from_switching_off(server, stub, client, make_engine):
    make_engine()
    started = threading.Event()

    async def hang():
        started.set()
        await asyncio.sleep(3600)

    driver = server.server._rollout_driver
    driver.read, driver.read_seconds = hang, 3.0
    _start(stub)
    assert started.wait(20)
    asked = time.monotonic()
    assert client.update_policy(dataclasses.replace(BASE, enabled=False)).revision == 2
    print(f"switched off after {time.monotonic() - asked:.3f} s")
    assert _get(stub).state == ABORTED, "the update did not wait for the analysis"
    assert "replaced revision 1" in _get(stub).reason


def test_what_was_measured_is_kept_with_a_roll_out_of_one_step(stub, make_engine):
    make_engine()
    _start(stub, shares=[0.5])
    assert {e.side for e in _wait(stub, PROMOTED, PAUSED, ABORTED).evidence} == {1, 2}


def test_an_engine_that_says_nothing_pauses(server, stub, make_engine):
    server.server._rollout_driver.silence_seconds = 0.3
    make_engine()
    make_engine("e2").silent = True
    _start(stub)
    over = _wait(stub, PROMOTED, PAUSED, ABORTED)
    assert (over.state, "engine e2 has not reported" in over.reason) == (PAUSED, True), over.reason


def test_an_engine_that_goes_away_pauses(server, stub, make_engine):
    server.server._rollout_driver.patience_seconds = 0.1
    make_engine()
    gone = make_engine("e2")
    _start(stub)
    wait_for(lambda: gone.in_force.get(2), "the candidate in both")
    gone.close()
    over = _wait(stub, PROMOTED, PAUSED, ABORTED)
    assert (over.state, "engine e2 is not connected" in over.reason) == (PAUSED, True), over.reason
    _change(stub, "Resume", comment="it is not needed")
    assert _wait(stub, PROMOTED, ABORTED).state == PROMOTED


def test_no_engine_at_all_pauses(stub, client):
    client.update_policy(BASE)
    _start(stub)
    assert _wait(stub, PROMOTED, PAUSED, ABORTED).reason == "no engine is connected"


def test_an_engine_that_refuses_pauses_at_once_and_is_asked_again_after_a_resume(stub, client, make_engine):
    engine = make_engine()
    engine.refuse_candidate = "policy.checkpoints[0].layer: no"
    _start(stub, interval_seconds=3600)
    paused = _wait(stub, PAUSED)
    assert paused.reason == "engine e1 refused: policy.checkpoints[0].layer: no"
    shown = client.get_status().engines[0]
    assert (shown.state, shown.error.message, shown.active_revision, shown.active_rollout) == (3, "policy.checkpoints[0].layer: no", 1, 0)
    engine.refuse_candidate = ""
    _change(stub, "Resume")
    wait_for(lambda: client.get_status().engines[0].active_rollout == 1, "the candidate in force")
    assert client.get_status().engines[0].state == control_pb2.ENGINE_STATE_SYNCED


@pytest.mark.parametrize("how", ["off", "update", "rollback"])
def test_a_new_revision_ends_it(stub, client, make_engine, how):
    engine = make_engine()
    _start(stub, interval_seconds=3600)
    wait_for(lambda: engine.in_force.get(2), "the candidate")
    if how == "rollback":
        client.rollback(1)
    else:
        client.update_policy(dataclasses.replace(BASE, enabled=how != "off"))
    over = _get(stub)
    assert (over.state, over.promoted_revision) == (ABORTED, 0)
    assert over.reason.startswith("revision 2 by tester replaced revision 1")
    client.wait_until_synced(2, 10)
    last = _drain(engine)[-1]
    assert (last.policy.revision, last.HasField("candidate")) == (2, False), "one push, not two"


def test_operators_pause_resume_promote_and_abort(stub, client, make_engine):
    make_engine()
    first = _start(stub, interval_seconds=3600)
    paused = _change(stub, "Pause", comment="lunch", etag=first.etag)
    assert (paused.state, "lunch" in paused.reason) == (PAUSED, True)
    for what, code in (("Pause", grpc.StatusCode.FAILED_PRECONDITION), ("Abort", grpc.StatusCode.ABORTED)):
        with pytest.raises(grpc.RpcError) as refused:
            _change(stub, what, etag=first.etag if what == "Abort" else "")
        assert refused.value.code() == code
    assert _change(stub, "Resume").state == PROGRESSING
    assert _change(stub, "Abort", name="rollouts/1", comment="enough").state == ABORTED
    second = _start(stub, None, revision=1, interval_seconds=3600)
    assert wire.policy_from_proto(second.policy) == BASE, "the content of revision 1"
    done = _change(stub, "Promote")
    assert (done.state, done.promoted_revision, client.get_policy().revision) == (PROMOTED, 2, 2)
    for what in ("Pause", "Resume", "Promote", "Abort"):
        with pytest.raises(grpc.RpcError) as refused:
            _change(stub, what)
        assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    listed = stub.ListRollouts(rollouts_pb2.ListRolloutsRequest(page_size=1))
    assert [r.number for r in listed.rollouts] == [2]
    assert [r.number for r in stub.ListRollouts(rollouts_pb2.ListRolloutsRequest(page_token=listed.next_page_token)).rollouts] == [1]


@pytest.mark.parametrize(
    ("terms", "field"),
    [
        ({"shares": [0.5, 0.1]}, "shares[1]"),
        ({"shares": [0.0]}, "shares[0]"),
        ({"shares": [1.5]}, "shares[0]"),
        ({"shares": [math.nan]}, "shares[0]"),
        ({"shares": [i / 100 for i in range(1, 40)]}, "shares"),
        ({"interval_seconds": 0.0}, "interval_seconds"),
        ({"interval_seconds": math.nan}, "interval_seconds"),
        ({"min_requests": 0}, "min_requests"),
        ({"bounds": {"max_mismatch": math.nan}}, "bounds.max_mismatch"),
        ({"bounds": {"max_error_share": -1}}, "bounds.max_error_share"),
        ({"bounds": {"max_latency_ratio": math.inf}}, "bounds.max_latency_ratio"),
        ({"bounds": {"confidence": 1.0}}, "bounds.confidence"),
        ({"candidate": FIRST}, "bounds.max_mismatch"),
        ({"candidate": dataclasses.replace(BASE, checkpoints=(Checkpoint(layer=3, threshold=1.0),))}, "policy.checkpoints[0].layer"),
        ({"revision": 1}, "policy"),
        ({"candidate": None}, "policy"),
        ({"comment": "x" * 2000}, "comment"),
    ],
)
def test_bad_terms_are_refused_with_their_field(stub, make_engine, terms, field):
    make_engine()
    with pytest.raises(grpc.RpcError) as refused:
        _start(stub, **terms)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert f"{field}: " in refused.value.details()
    with pytest.raises(grpc.RpcError) as none:
        _get(stub)
    assert none.value.code() == grpc.StatusCode.NOT_FOUND


def test_one_at_a_time_and_a_repeat_is_the_first(stub, make_engine):
    make_engine()
    first = _start(stub, request_id="a", interval_seconds=3600)
    assert _start(stub, request_id="a", interval_seconds=3600).number == first.number
    for terms, code in (({}, grpc.StatusCode.FAILED_PRECONDITION), ({"request_id": "a"}, grpc.StatusCode.ALREADY_EXISTS)):
        with pytest.raises(grpc.RpcError) as refused:
            _start(stub, interval_seconds=1800, **terms)
        assert refused.value.code() == code
    with pytest.raises(grpc.RpcError) as missing:
        _get(stub, "rollouts/9")
    assert missing.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("state", [PROGRESSING, PAUSED, PROMOTED, ABORTED])
def test_every_state_survives_a_restart_of_the_service(settings, state):
    server = RunningServer(settings)
    with ControlClient(server.address, author="tester") as client, grpc.insecure_channel(server.address) as channel:
        client.update_policy(BASE)
        stub = rollouts_pb2_grpc.RolloutsStub(channel)
        _start(stub, interval_seconds=3600)
        for what in {PAUSED: ["Pause"], PROMOTED: ["Promote"], ABORTED: ["Abort"]}.get(state, []):
            _change(stub, what)
        before = _get(stub)
    server.stop()
    server = RunningServer(settings)
    with grpc.insecure_channel(server.address) as channel:
        assert _get(rollouts_pb2_grpc.RolloutsStub(channel)) == before
        assert before.state == state
    server.stop()


def test_a_roll_out_goes_on_after_a_restart_of_the_service(settings):
    server = RunningServer(settings)
    engine = MeasuringEngine(server.address, initial=BASE, candidate=Measured(rate=0))
    wait_for(lambda: engine.counts, "the first policy")
    with grpc.insecure_channel(server.address) as channel:
        _start(rollouts_pb2_grpc.RolloutsStub(channel), interval_seconds=1.0)
        wait_for(lambda: engine.in_force.get(2), "the candidate")
    server.stop()
    engine.close()
    server = RunningServer(settings)
    again = MeasuringEngine(server.address, initial=BASE)
    try:
        with grpc.insecure_channel(server.address) as channel:
            stub = rollouts_pb2_grpc.RolloutsStub(channel)
            over = _wait(stub, PROMOTED, ABORTED, PAUSED)
            assert over.state == PROMOTED, over.reason
            wait_for(lambda: again.pushes.qsize() >= 3, "the push of the promoted policy")
            assert [(p.candidate.rollout, p.candidate.share) for p in _drain(again)] == [(1, 0.1), (1, 0.5), (0, 0)]
    finally:
        again.close()
        server.stop()


def test_a_restarted_engine_gets_the_candidate_and_what_it_measured_before_stays(stub, client, make_engine):
    engine = make_engine()
    _start(stub, interval_seconds=3600)

    def count() -> int:
        return sum(e.num_requests for e in client.get_status().evidence if e.side == 2)

    wait_for(lambda: count() >= 50, "evidence of the candidate")
    engine.close()
    wait_for(lambda: [e.state for e in client.get_status().engines] == [control_pb2.ENGINE_STATE_STALE], "the end of its reports")
    before = count()
    again = make_engine(candidate=Measured(rate=1))
    wait_for(lambda: again.in_force.get(2), "the candidate in the new process")
    wait_for(lambda: before < count() < before + again.counts[2] + 1, "evidence of both lives")
    assert _get(stub).state == PROGRESSING
