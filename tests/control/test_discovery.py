"""Engines on the discovery stream: pushes, answers, lost connections."""

from __future__ import annotations

import time

import grpc
import pytest
from sedac.client.client import ControlClient
from sedac.contract.mapping import write
from sedac.contract.v1 import control_pb2, control_pb2_grpc, drafting_pb2
from sedac.errors import NotSynced
from sedac.policy.model import Policy

from testing.control.engines import FIRST, FakeEngine
from testing.control.running import RunningServer
from testing.figures import make_controller, make_drafting


def _get_engine(client, engine_id="e1", *, state=None, timeout=5.0):
    deadline = time.monotonic() + timeout
    while True:
        engine = next((e for e in client.get_status().engines if e.engine.engine_id == engine_id), None)
        if (engine and state in (None, engine.state)) or time.monotonic() > deadline:
            assert engine is not None
            assert state in (None, engine.state), f"state is {control_pb2.EngineState.Name(engine.state)}"
            return engine
        time.sleep(0.01)


def test_the_first_engine_brings_the_first_policy(client, make_engine):
    push = make_engine().pushes.get(timeout=5)
    assert push.policy.revision == 1
    assert push.policy.author == "engine e1"
    engine = _get_engine(client, state=control_pb2.ENGINE_STATE_SYNCED)
    assert engine.active_revision == 1
    make_engine("e2", initial=Policy()).pushes.get(timeout=5)
    assert client.get_policy().revision == 1, "a later engine follows, it does not set"


def test_every_change_is_pushed_and_acked(client, make_engine):
    engine = make_engine()
    for revision in range(2, 12):
        client.wait_until_synced(revision - 1, 5)
        assert client.update_policy(FIRST).revision == revision
        client.wait_until_synced(revision, 5)
    assert [engine.pushes.get_nowait().policy.revision for _ in range(11)] == list(range(1, 12))


def test_one_push_at_a_time_and_then_the_newest(client, make_engine):
    engine = make_engine(answer=False)
    first = engine.pushes.get(timeout=5)
    for _ in range(5):
        client.update_policy(FIRST)
    time.sleep(0.2)
    assert engine.pushes.empty(), "the next push waits for the answer"
    assert _get_engine(client).state == control_pb2.ENGINE_STATE_PENDING
    engine.send(control_pb2.EngineMessage(answer=control_pb2.PolicyAnswer(nonce="wrong", revision=1)))
    time.sleep(0.2)
    assert engine.pushes.empty(), "an answer with another nonce is none"
    engine.answer(first)
    assert engine.pushes.get(timeout=5).policy.revision == 6


def test_a_nack_is_shown_with_its_reason_and_cleared_by_the_next_ack(client, make_engine):
    engine = make_engine()
    engine.pushes.get(timeout=5)
    engine.refuse = "checkpoints[0].layer: no"
    revision = client.update_policy(FIRST).revision
    with pytest.raises(NotSynced, match=r"engine e1 refused revision 2: checkpoints\[0\].layer: no"):
        client.wait_until_synced(revision, 5)
    shown = _get_engine(client, state=control_pb2.ENGINE_STATE_NACKED)
    assert (shown.active_revision, shown.desired_revision) == (1, 2)
    engine.refuse = ""
    client.update_policy(FIRST)
    assert not _get_engine(client, state=control_pb2.ENGINE_STATE_SYNCED).HasField("error")


def test_a_lost_engine_is_stale_and_comes_back_by_itself(client, make_engine):
    engine = make_engine()
    engine.pushes.get(timeout=5)
    client.wait_until_synced(1, 5)
    engine.close()
    assert _get_engine(client, state=control_pb2.ENGINE_STATE_STALE).active_revision == 1
    client.update_policy(FIRST)
    assert make_engine().pushes.get(timeout=5).policy.revision == 2
    _get_engine(client, state=control_pb2.ENGINE_STATE_SYNCED)


def test_a_newer_stream_replaces_the_older_of_the_same_engine(client, make_engine):
    older = make_engine()
    older.pushes.get(timeout=5)
    newer = make_engine()
    newer.pushes.get(timeout=5)
    ended = older.wait_for_end()
    assert ended.code() == grpc.StatusCode.ABORTED
    assert "a newer connection of engine 'e1' took over; two engines need two ids (SEDAC_ENGINE_ID)" in ended.details()
    client.update_policy(FIRST)
    assert newer.pushes.get(timeout=5).policy.revision == 2
    assert [e.engine.engine_id for e in client.get_status().engines] == ["e1"]
    _get_engine(client, state=control_pb2.ENGINE_STATE_SYNCED)


def test_a_replaced_stream_ends_even_while_its_push_is_unanswered(client, make_engine):
    silent = make_engine(answer=False)
    silent.pushes.get(timeout=5)
    make_engine().pushes.get(timeout=5)
    assert silent.wait_for_end().code() == grpc.StatusCode.ABORTED
    _get_engine(client, state=control_pb2.ENGINE_STATE_SYNCED)


def test_engines_that_start_at_once_bring_one_first_policy(client, make_engine):
    engines = [make_engine(f"e{i}") for i in range(8)]
    assert {engine.pushes.get(timeout=5).policy.revision for engine in engines} == {1}
    assert [p.revision for p in client.list_revisions()] == [1]


def test_a_new_revision_is_pending_until_it_is_answered(client, make_engine):
    """A NACK of the revision before must not be taken for one of this."""
    engine = make_engine()
    client.wait_until_synced(1, 5)
    engine.refuse = "no"
    client.update_policy(FIRST)
    _get_engine(client, state=control_pb2.ENGINE_STATE_NACKED)
    engine.refuse, engine.answers = "", False
    client.update_policy(FIRST)
    shown = _get_engine(client)
    assert (shown.state, shown.desired_revision, shown.active_revision) == (control_pb2.ENGINE_STATE_PENDING, 3, 1)
    assert not shown.HasField("error")
    with pytest.raises(NotSynced, match=r"revision 3 is not in force everywhere after 0.2 s: waiting for e1"):
        client.wait_until_synced(3, 0.2)


def test_an_ack_of_another_revision_counts_as_a_refusal(client, make_engine):
    engine = make_engine(answer=False)
    push = engine.pushes.get(timeout=5)
    engine.send(control_pb2.EngineMessage(answer=control_pb2.PolicyAnswer(nonce=push.nonce, revision=7)))
    assert "acknowledged revision 1 but runs 7" in _get_engine(client, state=control_pb2.ENGINE_STATE_NACKED).error.message


def test_an_engine_without_a_first_policy_waits_for_one(client, make_engine):
    engine = make_engine(initial=None)
    _get_engine(client)
    assert engine.pushes.empty()
    client.update_policy(FIRST)
    assert engine.pushes.get(timeout=5).policy.author == "tester"


def test_an_engine_that_has_nothing_more_to_say_is_stale(client, make_engine):
    engine = make_engine()
    client.wait_until_synced(1, 5)
    engine.send(None)
    assert engine.wait_for_end() is None
    _get_engine(client, state=control_pb2.ENGINE_STATE_STALE)


def test_a_stopping_service_tells_its_engines(settings):
    running = RunningServer(settings.model_copy(update={"drain_seconds": 60}))
    engine = FakeEngine(running.address)
    engine.pushes.get(timeout=5)
    running.stop()
    assert engine.wait_for_end().code() == grpc.StatusCode.UNAVAILABLE
    engine.close()


def test_reports_are_shown(client, make_engine):
    engine = make_engine()
    engine.pushes.get(timeout=5)
    drafting = write(make_drafting((3, 2), controller=(make_controller(4),)), drafting_pb2.Drafting())
    engine.send(control_pb2.EngineMessage(report=control_pb2.EngineReport(num_steps=7, drafting=drafting)))
    deadline = time.monotonic() + 5
    while _get_engine(client).report.num_steps != 7 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert _get_engine(client).report.num_steps == 7
    assert _get_engine(client).report.drafting == drafting


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (control_pb2.EngineMessage(report=control_pb2.EngineReport()), "hello: the first message must be a hello"),
        (control_pb2.EngineMessage(hello=control_pb2.EngineHello()), "hello.engine_id: 0 characters; give 1 to 128"),
        (control_pb2.EngineMessage(hello=control_pb2.EngineHello(engine_id="e", model="m" * 70_000)), "hello: 70007 bytes; at most 65536"),
        (
            control_pb2.EngineMessage(hello=control_pb2.EngineHello(engine_id="e", initial_policy=control_pb2.Policy(phase=9))),
            "hello.initial_policy.phase: 9 is unknown",
        ),
    ],
)
def test_a_stream_without_a_good_hello_is_refused(server, client, message, complaint):
    with grpc.insecure_channel(server.address) as channel:
        call = control_pb2_grpc.DiscoveryStub(channel).Follow(iter([message]))
        with pytest.raises(grpc.RpcError) as refused:
            next(call)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert complaint in refused.value.details()
    assert not client.get_status().engines, "who was refused is no engine"


def test_a_restarted_service_pushes_the_same_revision(settings):
    first = RunningServer(settings)
    with ControlClient(first.address) as client:
        client.update_policy(FIRST)
        client.update_policy(FIRST)
    first.stop()
    second = RunningServer(settings)
    engine = FakeEngine(second.address)
    assert engine.pushes.get(timeout=5).policy.revision == 2
    engine.close()
    second.stop()
