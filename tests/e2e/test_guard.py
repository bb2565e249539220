"""The guard and roll-outs on the running product: live traffic, real audits, the real engine's own losses."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from sedac.contract import wire
from sedac.contract.v1 import control_pb2, evidence_pb2, rollouts_pb2
from sedac.policy.model import Audit, Checkpoint, Policy, Tier
from sedac_probes import corpus

pytestmark = pytest.mark.e2e

PROMPTS = corpus.cut_prompts(corpus.read_stdlib("heldout"), num_prompts=512, num_chars=120)
LAYERS = (2, 5, 8)
NUM_TOKENS = 16
NUM_STREAMS = 4
BOUND = 0.1
WAIT_SECONDS = 600
FULL = Policy(
    enabled=True,
    strict=True,
    checkpoints=tuple(Checkpoint(layer=layer, threshold=0.0) for layer in LAYERS),
    tiers=(Tier(name="balanced", level="skip"),),
    audit=Audit(share=1.0, max_mismatch=BOUND),
)
"""audited and guarded; no token exits"""
GOOD = replace(FULL, tiers=(Tier(name="balanced", floor="contextual-20", level="contextual-20"),))
"""loses far less than the bound"""
BAD = replace(FULL, checkpoints=tuple(Checkpoint(layer=layer, threshold=1e9) for layer in LAYERS))
"""every generated token exits after the first checkpoint"""


@contextlib.contextmanager
def traffic(served) -> Iterator[list[int]]:
    """Greedy requests from closed-loop streams, none of which may fail; yields the count of finished ones (a list of one)."""
    client, stop, done, numbers = served.make_openai(), threading.Event(), [0], itertools.count()

    def ask() -> None:
        while not stop.is_set():
            prompt = PROMPTS[next(numbers) % len(PROMPTS)]
            client.completions.create(model="sedac-demo", prompt=prompt, max_tokens=NUM_TOKENS, temperature=0, extra_body={"ignore_eos": True})
            done[0] += 1

    with concurrent.futures.ThreadPoolExecutor(NUM_STREAMS) as pool:
        asked = [pool.submit(ask) for _ in range(NUM_STREAMS)]
        try:
            yield done
        finally:
            stop.set()
        for future in asked:
            future.result()


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.1)


def _set(control, policy: Policy) -> control_pb2.Policy:
    made = control.update_policy(policy)
    control.wait_until_synced(made.revision, 30)
    return made


def _read_evidence(control, side: evidence_pb2.Side = evidence_pb2.SIDE_STABLE) -> evidence_pb2.TierEvidence:
    found = (e for e in control.get_status().evidence if (e.side, e.tier) == (side, "balanced"))
    return next(found, evidence_pb2.TierEvidence())


def _run_rollout(control, candidate: Policy, **knobs) -> rollouts_pb2.Rollout:
    """Start a roll-out and see it to its end; one that pauses for want of answers, on a slow machine, is resumed as an operator would."""
    number = control.start_rollout(candidate, **knobs).number
    deadline = time.monotonic() + WAIT_SECONDS
    while (rollout := control.get_rollout(number)).state not in (rollouts_pb2.ROLLOUT_STATE_PROMOTED, rollouts_pb2.ROLLOUT_STATE_ABORTED):
        assert time.monotonic() < deadline, rollout.reason
        if rollout.state == rollouts_pb2.ROLLOUT_STATE_PAUSED:
            print(f"\npaused: {rollout.reason}")
            control.resume_rollout(number)
        time.sleep(0.5)
    return rollout


@pytest.mark.parametrize("num_requests", [100, *(pytest.param(n, marks=pytest.mark.thorough) for n in (200, 1000))])
def test_the_guard_lets_a_good_policy_be_and_takes_a_bad_one_back(served, control, num_requests):
    good, before = _set(control, GOOD), control.get_status().guard
    with traffic(served):
        _until(lambda: _read_evidence(control).mismatch.num_requests >= num_requests)
        evidence = _read_evidence(control)
        assert control.get_policy().revision == good.revision, "a good policy stays"
        assert control.get_status().guard == before, "the guard has not acted"
        bad = control.update_policy(BAD)
        _until(lambda: control.get_policy().revision > bad.revision)
        back = control.get_policy()
        control.wait_until_synced(back.revision, 30)
    guard = control.get_status().guard
    print(
        f"\ngood: mismatch {evidence.mismatch.mean:.4f} [{evidence.mismatch.lower:.4f}, {evidence.mismatch.upper:.4f}] over "
        f"{evidence.mismatch.num_requests} audited requests, bound {BOUND}: left alone\nbad: {guard.reason}"
    )
    assert back.author == "guard"
    assert wire.policy_from_proto(back) == GOOD, "back to the last good revision"
    assert (guard.refused_revision, guard.revision) == (bad.revision, back.revision)
    assert [e.principal for e in control.list_audit_entries()][:1] == ["guard"]


def test_without_a_good_revision_the_guard_makes_every_answer_exact(served, control):
    _set(control, replace(FULL, audit=Audit()))
    bad = control.update_policy(replace(BAD, audit=replace(BAD.audit, action="exact")))
    with traffic(served):
        _until(lambda: control.get_policy().revision > bad.revision)
    back = control.get_policy()
    assert back.author == "guard"
    assert not back.enabled
    control.wait_until_synced(back.revision, 30)
    assert served.read_metrics()["sedac_policy_enabled"] == 0


@pytest.mark.parametrize("seconds", [3.0, pytest.param(10.0, marks=pytest.mark.thorough)])
def test_a_roll_out_is_judged_by_live_traffic(served, control, seconds):
    base = _set(control, FULL)
    knobs = {"shares": (0.3, 0.6), "interval_seconds": seconds, "min_requests": 20, "max_mismatch": BOUND}
    with traffic(served):
        ended = _run_rollout(control, BAD, **knobs)
        print(f"\nbad candidate: {ended.reason}")
        assert ended.state == rollouts_pb2.ROLLOUT_STATE_ABORTED
        assert ended.step == 0, "within the first share"
        assert control.get_policy().revision == base.revision, "the policy in force never changed"
        ended = _run_rollout(control, GOOD, **{**knobs, "min_requests": 40, "interval_seconds": 2 * seconds})
        print(f"good candidate: {ended.reason}")
        assert ended.state == rollouts_pb2.ROLLOUT_STATE_PROMOTED
        control.wait_until_synced(ended.promoted_revision, 30)
    assert wire.policy_from_proto(control.get_policy()) == GOOD
    assert served.read_metrics()["sedac_torn_steps_total"] == 0
