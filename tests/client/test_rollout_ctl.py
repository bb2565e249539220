"""`sedac ctl rollout`, and what `status` shows of roll-outs, audits and the guard, against a real control service."""

from __future__ import annotations

import json
import threading
import time

import pytest
from google.protobuf import json_format
from sedac.contract import wire
from sedac.contract.v1 import control_pb2, evidence_pb2
from sedac.ctl.root import app
from sedac.policy.model import Audit, Checkpoint, Policy
from typer.testing import CliRunner

from testing.control.engines import FIRST
from testing.control.watching import watching

CANDIDATE = Policy(enabled=True, checkpoints=(Checkpoint(layer=2, threshold=0.75), Checkpoint(layer=5, threshold=0.5)))


@pytest.fixture
def candidate(tmp_path) -> str:
    path = tmp_path / "candidate.json"
    path.write_text(json_format.MessageToJson(wire.policy_to_proto(CANDIDATE), preserving_proto_field_name=True))
    return str(path)


def _wait(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_roll_out_by_hand_from_start_to_promotion(ctl, client, make_engine, candidate):
    make_engine().pushes.get(timeout=10)
    done = ctl(
        "rollout", "start", candidate, "--share", "0.1", "--share", "0.5", "--interval", "3600", "--min-requests", "7",
        "--max-latency-ratio", "1.5", "--max-error-share", "0.01", "--confidence", "0.9", "--comment", "wider", "--wait", "10",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    for words in ("PROGRESSING", "10.0% of the requests, step 1 of 2", "latency ratio <= 1.5, errors <= 0.01 at 0.9", ": wider", "from 7 requests"):
        assert words in done.output
    assert [e.active_rollout for e in client.list_engines()] == [1], "it waited until the engine runs the candidate"
    assert "+ roll-out 1" in ctl("status").output
    refused = ctl("rollout", "start", candidate)
    assert refused.exit_code == 1
    assert "rollouts/1" in refused.stderr
    paused = ctl("rollout", "pause", "--comment", "lunch", "--wait", "10")
    assert paused.exit_code == 0, paused.output
    assert "PAUSED" in paused.output
    assert json.loads(ctl("rollout", "show", "--json").output)["state"] == "ROLLOUT_STATE_PAUSED"
    assert "PROGRESSING" in ctl("rollout", "resume", "1").output
    promoted = ctl("rollout", "promote", "rollouts/1", "--wait", "10")
    assert promoted.exit_code == 0, promoted.output
    assert "became revision 2" in promoted.output
    assert wire.policy_from_proto(client.get_policy()) == CANDIDATE
    assert [e.active_rollout for e in client.list_engines()] == [0]
    over = ctl("rollout", "abort")
    assert over.exit_code == 1, "it is over"
    assert [r["number"] for r in json.loads(ctl("rollout", "list", "--json").output)] == ["1"]
    assert "PROMOTED" in ctl("rollout", "list").output
    assert "PROMOTED" in ctl("status").output


def test_a_revision_may_be_the_candidate_and_abort_gives_the_requests_back(ctl, client, make_engine):
    make_engine().pushes.get(timeout=10)
    client.update_policy(CANDIDATE)
    client.update_policy(FIRST)
    assert ctl("rollout", "start", "--revision", "2", "--wait", "10").exit_code == 0
    aborted = ctl("rollout", "abort", "--comment", "seen enough", "--wait", "10")
    assert aborted.exit_code == 0, aborted.output
    assert "ABORTED" in aborted.output
    assert "seen enough" in aborted.output
    assert wire.policy_from_proto(client.get_policy()) == FIRST
    assert [e.active_rollout for e in client.list_engines()] == [0]


def test_wrong_usage_of_start_is_told_before_anything_is_sent(ctl, candidate):
    for arguments in ((), (candidate, "--revision", "3")):
        done = ctl("rollout", "start", *arguments)
        assert done.exit_code == 2
        assert "give a candidate" in done.output
    none = ctl("rollout", "show")
    assert none.exit_code == 1
    assert "sedac ctl rollout start" in none.stderr


def test_waiting_for_an_engine_that_refuses_the_candidate_fails(ctl, make_engine, candidate):
    engine = make_engine()
    engine.pushes.get(timeout=10)
    engine.refuse = "no room for two"
    done = ctl("rollout", "start", candidate, "--wait", "10")
    assert done.exit_code == 3
    assert "no room for two" in done.stderr


def test_watch_shows_every_change_until_it_is_over(server, client, make_engine):
    make_engine().pushes.get(timeout=10)
    client.start_rollout(CANDIDATE, shares=[0.5], interval_seconds=3600)
    with watching(server, "rollout", "watch", "--json", "--interval", "0.05") as lines:
        assert json.loads(next(lines))["state"] == "ROLLOUT_STATE_PROGRESSING"
        client.pause_rollout()
        assert json.loads(next(lines))["state"] == "ROLLOUT_STATE_PAUSED"
    ending = threading.Timer(0.3, client.abort_rollout)
    ending.start()
    done = CliRunner().invoke(app, ["rollout", "watch", "--interval", "0.05", "--address", server.address], env={"COLUMNS": "250"})
    ending.join()
    assert done.exit_code == 0, "it is over, so the watch is"
    assert "ABORTED" in done.output


def _make_evidence(number: int, side: evidence_pb2.Side, *, mismatch: int, revision: int = 0, rollout: int = 0) -> evidence_pb2.Evidence:
    moments = evidence_pb2.Moments(count=number, sum=0.02 * number, sum_squares=0.0004 * number)
    return evidence_pb2.Evidence(
        side=side,
        revision=revision,
        rollout=rollout,
        tier="balanced",
        num_requests=number,
        first_token_seconds=moments,
        token_seconds=moments,
        num_audited_tokens=number * 16,
        mismatch_counts={mismatch: number},
        nll_difference_counts={0: number},
    )


def test_status_shows_the_sides_with_confidence_limits_and_what_the_guard_did(ctl, client, make_engine):
    engine = make_engine(initial=FIRST)
    engine.pushes.get(timeout=10)
    made = client.update_policy(CANDIDATE, comment="good")
    made = client.update_policy(Policy(**{**vars(CANDIDATE), "audit": Audit(share=1.0, max_mismatch=0.1)}), comment="made bad on purpose")
    client.wait_until_synced(made.revision, 10)
    client.start_rollout(CANDIDATE, shares=[0.25], interval_seconds=3600)
    client.wait_until_synced(made.revision, 10, rollout=1)
    sides = [
        _make_evidence(40, evidence_pb2.SIDE_STABLE, mismatch=10, revision=made.revision),
        _make_evidence(20, evidence_pb2.SIDE_CANDIDATE, mismatch=20, rollout=1),
    ]
    report = control_pb2.EngineReport(active_revision=made.revision, active_rollout=1, num_steps=1, evidence=sides)
    engine.send(control_pb2.EngineMessage(report=report))
    _wait(lambda: len(client.get_status().evidence) == 2)
    shown = ctl("status").output
    assert "25.0% of the requests, step 1 of 1" in shown
    rows = {line.split()[0]: line for line in shown.splitlines() if line.split()[:2] in (["stable", "balanced"], ["candidate", "balanced"])}
    assert " 40 " in rows["stable"]
    assert " 20.0 ms" in rows["candidate"]
    found = {side.side: side.mismatch for side in client.get_status().evidence}
    estimate = found[evidence_pb2.SIDE_CANDIDATE]
    assert f"{estimate.lower:.4f} .. {estimate.mean:.4f} .. {estimate.upper:.4f}  (20)" in rows["candidate"]
    client.abort_rollout()
    report = control_pb2.EngineReport(
        active_revision=made.revision, num_steps=2, evidence=[_make_evidence(4000, evidence_pb2.SIDE_STABLE, mismatch=900, revision=made.revision)]
    )
    engine.send(control_pb2.EngineMessage(report=report))
    _wait(lambda: client.get_status().HasField("guard"))
    guard = client.get_status().guard
    assert guard.refused_revision == made.revision
    assert f"took revision {made.revision} out of force, made {guard.revision}" in ctl("status").output
    assert "guard" in {entry.principal for entry in client.list_audit_entries()}
    assert "guard" in ctl("audit", "list").output
