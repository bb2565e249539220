"""Reports call a request certified only where it ran under its certificate's knobs from its first step to its last."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sedac.engine.backends.tokens import DECIDES, OBSERVED, OF_CANDIDATE, SOFT
from sedac.engine.step.requests import Requests
from sedac.policy.model import Candidate, Checkpoint, Policy, Tier
from sedac.policy.request_keys import CERTIFICATE_KEY, LEVEL_KEY, ROLLOUT_KEY, SCALE_KEY, TIER_KEY

from testing.strategies import certify
from tests.engine.states import make_state

POLICY = certify(Policy(enabled=True, checkpoints=(Checkpoint(layer=1, threshold=0.5),), tiers=(Tier(name="balanced"), Tier(name="night"))))
CHANGED = certify(replace(POLICY, sensitivity=0.5))
PROMISE = {TIER_KEY: "balanced", CERTIFICATE_KEY: POLICY.certificate.knobs_sha256}


def _run(extra: dict[str, str], *policies: Policy, prompt: int = 2) -> dict:
    """Compute a request, one token a step, each step under its own policy; returns its report."""
    state = make_state(use_native=False)
    requests = Requests(state)
    requests.add("cmpl-1-0-x", extra)
    bounds = np.array([0, 1])
    for step, policy in enumerate(policies):
        state.apply(policy, step + 1)
        tokens = requests.make_tokens(["cmpl-1-0-x"], bounds, np.array([prompt]), np.array([step])) if policy.enabled else None
        state.begin_step(1, tokens)
        requests.count_step(["cmpl-1-0-x"], bounds, state.end_step())
    requests.finish(["cmpl-1-0-x"])
    return requests.get_report("cmpl-1")


@pytest.mark.parametrize(
    ("extra", "policies", "certified"),
    [
        (PROMISE, [POLICY] * 4, True),
        (PROMISE, [POLICY, replace(POLICY, default_tier="night"), POLICY], True),
        (PROMISE, [POLICY, replace(POLICY, certificate=None), POLICY], False),
        (PROMISE, [POLICY, POLICY, CHANGED], False),
        (PROMISE, [POLICY, CHANGED, POLICY], False),
        (PROMISE, [POLICY, POLICY, replace(POLICY, enabled=False), POLICY], False),
        ({TIER_KEY: "balanced"}, [POLICY] * 3, False),
        ({TIER_KEY: "exact"}, [POLICY] * 3, False),
        (PROMISE, [replace(POLICY, certificate=None)] * 3, False),
    ],
)
def test_certified_from_the_first_step_to_the_last(extra, policies, certified):
    report = _run(extra, *policies)
    assert report["num_tokens"] == len(policies)
    assert report["certified"] is certified


def test_a_response_is_certified_where_all_its_parts_are():
    requests = Requests(make_state(use_native=False))
    for part, extra in (("cmpl-1-0-x", PROMISE), ("cmpl-1-1-y", PROMISE)):
        requests.add(part, extra)
    assert requests.get_report("cmpl-1")["certified"]
    requests.add("cmpl-1-2-z", {TIER_KEY: "night"})
    assert not requests.get_report("cmpl-1")["certified"]


def test_certified_means_one_probe_set_too():
    other = replace(POLICY, certificate=replace(POLICY.certificate, probe_set_sha256="e" * 64))
    assert other.certificate.knobs_sha256 == POLICY.certificate.knobs_sha256
    assert _run(PROMISE, other, other)["certified"]
    assert not _run(PROMISE, POLICY, other)["certified"]


def _stamp(rollout: int, **extra: str) -> dict:
    return {ROLLOUT_KEY: rollout, **extra}


def test_the_side_of_a_request_is_the_roll_out_s_while_it_is_in_force():
    state = make_state(use_native=False)
    candidate = Policy(
        enabled=True, checkpoints=(Checkpoint(layer=3, threshold=0.5),), phase="all", sensitivity=1.0, rule="accumulate",
        tiers=(Tier(name="night", level="contextual-20", soft_exit=True),), default_tier="night",
    )  # fmt: skip
    state.apply(POLICY, 1, Candidate(rollout=5, policy=candidate, share=0.5))
    requests = Requests(state)
    balanced, night = {TIER_KEY: "balanced"}, {TIER_KEY: "night"}
    stamps = {"a": balanced, "b": _stamp(5, **night), "c": _stamp(4, **balanced), "d": _stamp(5, **balanced), "e": balanced}
    for request_id, extra in stamps.items():
        requests.add(request_id, extra)
    ids, bounds, num_prompt, num_computed = list(stamps), np.arange(0, 11, 2), np.full(5, 3), np.array([3, 0, 3, 3, 0])

    def make():
        return requests.make_tokens(ids, bounds, num_prompt, num_computed)

    hard, soft = DECIDES, DECIDES | SOFT | OF_CANDIDATE
    tokens = make()
    assert tokens.role_T.tolist() == [hard, hard, soft, soft, hard, hard, 0, 0, 0, 0], "d asks for a tier of the stable policy, e is in its prompt"
    assert tokens.goal_T.tolist()[::2] == [1, 3, 1, 1, 1]
    assert {i: requests.get_report(i)["side"] for i in ids} == {"a": "stable", "b": "candidate", "c": "stable", "d": "candidate", "e": "stable"}
    assert [requests.get_report(i)["tier"] for i in ids] == ["balanced", "night", "balanced", "balanced", "balanced"]
    state.apply(replace(POLICY, enabled=False), 2, Candidate(rollout=5, policy=replace(candidate, phase="decode"), share=0.5))
    observed = OBSERVED | OF_CANDIDATE
    assert make().role_T.tolist() == [0, 0, observed, observed, 0, 0, 0, 0, 0, 0], "the stable policy is off, b is in its prompt"
    state.apply(POLICY, 3)
    assert make().role_T.tolist() == [hard, hard, 0, 0, hard, hard, hard, hard, 0, 0]
    assert {requests.get_report(i)["side"] for i in ids} == {"stable"}
    assert requests.get_report("b")["revision"] == 3


@pytest.mark.parametrize("extra", [{}, {ROLLOUT_KEY: 5}, {SCALE_KEY: 2.0, LEVEL_KEY: "skip"}])
def test_a_request_without_a_tier_is_exact(extra):
    """It did not come through the server, which stamps every one."""
    state = make_state(use_native=False)
    state.apply(POLICY, 1, Candidate(rollout=5, policy=POLICY, share=0.5))
    requests = Requests(state)
    requests.add("a", extra)
    requests.add("b", {**extra, TIER_KEY: "balanced"})
    tokens = requests.make_tokens(["a", "b"], np.array([0, 1, 2]), np.array([1, 1]), np.array([1, 1]))
    assert tokens.role_T[0] == 0
    assert tokens.role_T[1] & DECIDES
    assert [requests.get_report(i)["tier"] for i in "ab"] == ["exact", "balanced"]


def test_a_candidate_may_be_enabled_beside_a_policy_that_is_not():
    state = make_state(use_native=False)
    state.apply(Policy(), 1, Candidate(rollout=1, policy=POLICY, share=0.5))
    assert state.is_enabled
    requests = Requests(state)
    requests.add("a", PROMISE)
    requests.add("b", _stamp(1, **PROMISE))
    tokens = requests.make_tokens(["a", "b"], np.array([0, 1, 2]), np.array([1, 1]), np.array([1, 1]))
    assert tokens.role_T.tolist() == [0, DECIDES | OF_CANDIDATE]
    assert [requests.get_report(i)["certified"] for i in "ab"] == [False, True]


def test_requests_count_plain_and_repeated_steps():
    state = make_state(use_native=True)
    requests = Requests(state)
    state.apply(POLICY, 1)
    requests.add("cmpl-1-0-x", PROMISE)
    requests.add("cmpl-2-0-y", {TIER_KEY: "exact"})
    assert requests.num_bounded == 1
    ids, bounds, prompts = ["cmpl-1-0-x", "cmpl-2-0-y"], np.array([0, 1, 2]), np.array([1, 1])
    for step in range(1, 6):
        tokens = requests.make_tokens(ids, bounds, prompts, np.array([step, step]))
        if not state.begin_repeat(tokens):
            state.begin_step(2, tokens)
            requests.count_step(ids, bounds, state.end_step())
        else:
            state.end_repeat()
    requests.add("cmpl-4-0-w", PROMISE)
    requests.make_tokens([*ids, "cmpl-4-0-w"], np.array([0, 1, 2, 4]), np.array([1, 1, 2]), np.array([6, 6, 0]))
    requests.finish(["cmpl-4-0-w"])
    assert requests.get_report("cmpl-1")["num_tokens"] == 5, "steps before others joined"
    assert requests.get_report("cmpl-1")["certified"]
    requests.finish(["cmpl-1-0-x"])
    assert requests.num_bounded == 0
    requests.count_plain({"cmpl-2-0-y": 3})
    assert requests.get_report("cmpl-2")["num_tokens"] == 8
    state.apply(replace(POLICY, enabled=False), 2)
    requests.add("cmpl-3-0-z", PROMISE)
    requests.count_plain({"cmpl-3-0-z": 1})
    assert not requests.get_report("cmpl-3")["certified"]


def test_a_batch_of_others_is_no_repeat():
    """The same ids with another policy, and other ids, get tokens of their own."""
    state = make_state(use_native=True)
    requests = Requests(state)
    state.apply(POLICY, 1)
    for i in ("a", "b"):
        requests.add(i, PROMISE)
    one = np.array([1])
    first = requests.make_tokens(["a"], np.array([0, 1]), one, one)
    assert requests.make_tokens(["a"], np.array([0, 1]), one, one + 1) is first
    assert requests.make_tokens(["b"], np.array([0, 1]), one, one) is not first
    second = requests.make_tokens(["a"], np.array([0, 1]), one, one + 2)
    assert second is not first
    state.apply(CHANGED, 2)
    assert requests.make_tokens(["a"], np.array([0, 1]), one, one + 3) is not second
