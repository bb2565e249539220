"""Reports call a request certified only where it ran under its certificate's knobs from its first step to its last."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sedac.engine.requests import Requests
from sedac.policy import CERTIFICATE_KEY, TIER_KEY, Checkpoint, Policy, Tier

from tests.engine.test_state import make_state
from tests.strategies import certify

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
