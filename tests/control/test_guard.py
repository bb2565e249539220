"""The guard: a policy whose answers lose too much is taken out of force, for the last good one or for exact; a good one stays."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from sedac.client.client import ControlClient
from sedac.contract import wire
from sedac.contract.evidence import LossCounts
from sedac.contract.v1 import control_pb2
from sedac.control.fleet.pooling import STABLE, Evidence, Pooled
from sedac.control.rollout.guard import find_excess, get_guard_confidence
from sedac.policy.model import Audit, Checkpoint, Policy, Tier

from testing.control.engines import FIRST
from testing.control.measuring import Measured, MeasuringEngine, wait_for
from testing.control.running import RunningServer

AUDIT = Audit(share=0.5, max_mismatch=0.05)
BAD = Measured(mismatch=300, rate=50)
GOOD_1 = dataclasses.replace(FIRST, audit=AUDIT)


def _make_policy(threshold: float, **more) -> Policy:
    return dataclasses.replace(FIRST, checkpoints=(Checkpoint(layer=5, threshold=threshold),), audit=AUDIT, **more)


class JudgingEngine(MeasuringEngine):
    """Measures 30 % mismatch under every policy whose threshold is 9 or more, 1 % under the others."""

    def answer(self, push) -> None:
        is_bad = push.policy.enabled and any(c.threshold >= 9 for c in push.policy.checkpoints)
        self.sides[1] = dataclasses.replace(BAD) if is_bad else Measured(rate=50 if push.policy.enabled else 0)
        super().answer(push)


@pytest.fixture
def make_engine(server):
    engines = []

    def make(initial=GOOD_1, **kwargs):
        engines.append(JudgingEngine(server.address, initial=initial, **kwargs))
        wait_for(lambda: engines[-1].counts, "the engine's first policy")
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def _wait_for_guard(client, refused: int):
    wait_for(lambda: client.get_status().guard.refused_revision == refused, f"the guard to refuse revision {refused}")
    return client.get_status().guard


def test_a_bad_policy_goes_back_to_the_last_good_one(client, server, make_engine, caplog):
    engine = make_engine()
    client.update_policy(_make_policy(1.0))
    client.wait_until_synced(2, 10)
    client.update_policy(_make_policy(9.0), comment="a bet")
    guard = _wait_for_guard(client, 3)
    assert guard.revision == 4
    assert "tier balanced: mismatch is over 0." in guard.reason
    assert "back to revision 2, the last good one" in guard.reason
    policy = client.get_policy()
    assert (policy.revision, policy.author) == (4, "guard")
    assert wire.policy_from_proto(policy) == _make_policy(1.0)
    client.wait_until_synced(4, 10)
    wait_for(lambda: engine.counts[1] >= 2000, "many good answers under the policy that came back")
    assert client.get_policy().revision == 4, "it is left alone"
    assert server.server._metrics.registry.get_sample_value("sedac_control_guard_actions_total", {"action": "rollback"}) == 1
    assert "the guard took revision 3 out of force" in caplog.text
    shown = wait_for(lambda: [e for e in client.get_status().evidence if e.tier == "balanced" and e.mismatch.num_requests], "evidence")[0]
    assert 0 <= shown.mismatch.lower < shown.mismatch.mean < shown.mismatch.upper <= 1
    labels = {"side": "stable", "tier": "balanced", "limit": "mean"}
    wait_for(lambda: server.server._metrics.registry.get_sample_value("sedac_control_audit_mismatch", labels) == 0.01, "the gauge")


def test_condemned_knobs_never_come_back(client, make_engine):
    make_engine()
    client.wait_until_synced(1, 10)
    for threshold, refused in ((9.0, 2), (10.0, 4), (9.0, 6)):
        client.update_policy(_make_policy(threshold))
        guard = _wait_for_guard(client, refused)
        assert "back to revision" in guard.reason
        assert wire.policy_from_proto(client.get_policy()) == GOOD_1
        client.wait_until_synced(refused + 1, 10)


def test_the_same_knobs_with_other_audit_settings_are_no_way_back(client, make_engine):
    make_engine(initial=dataclasses.replace(_make_policy(9.0), audit=Audit()))
    client.wait_until_synced(1, 10)
    client.update_policy(_make_policy(9.0))
    assert "exact, because no earlier revision is known to be good" in _wait_for_guard(client, 2).reason
    assert wire.policy_from_proto(client.get_policy()) == dataclasses.replace(_make_policy(9.0), enabled=False)


def test_without_a_good_one_it_goes_to_exact_and_the_audit_stays(client, server, make_engine):
    make_engine(initial=_make_policy(9.0))
    guard = _wait_for_guard(client, 1)
    assert guard.revision == 2
    assert not client.get_policy().enabled
    assert wire.policy_from_proto(client.get_policy()).audit == AUDIT
    client.wait_until_synced(2, 10)
    assert server.server._metrics.registry.get_sample_value("sedac_control_guard_actions_total", {"action": "exact"}) == 1


def test_it_goes_to_exact_where_the_policy_says_so(client, make_engine):
    make_engine()
    client.wait_until_synced(1, 10)
    client.update_policy(dataclasses.replace(_make_policy(9.0), audit=dataclasses.replace(AUDIT, action="exact")))
    assert "exact, as audit.action says" in _wait_for_guard(client, 2).reason
    assert not client.get_policy().enabled


def test_a_revision_that_no_engine_took_is_no_good_one(client, make_engine):
    engine = make_engine()
    client.wait_until_synced(1, 10)
    engine.answers = False  # revision 2 is pushed and never answered
    client.update_policy(_make_policy(2.0))
    push = wait_for(lambda: next((p for p in iter(engine.pushes.get, None) if p.policy.revision == 2), None), "revision 2")
    client.update_policy(_make_policy(9.0))
    engine.answers, engine.refuse_candidate = True, ""
    answer = control_pb2.PolicyAnswer(nonce=push.nonce, revision=1)
    answer.error.code, answer.error.message = 3, "no"
    engine.send(control_pb2.EngineMessage(answer=answer))
    assert "back to revision 1" in _wait_for_guard(client, 3).reason


def test_verdicts_survive_a_restart_of_the_service(settings):
    server = RunningServer(settings)
    engine = JudgingEngine(server.address, initial=GOOD_1)
    with ControlClient(server.address, author="tester") as client:
        client.wait_until_synced(1, 10)
        client.update_policy(_make_policy(9.0))
        before = _wait_for_guard(client, 2)
    server.stop()
    engine.close()
    server = RunningServer(settings)
    engine = JudgingEngine(server.address, initial=GOOD_1)
    with ControlClient(server.address, author="tester") as client:
        assert client.get_status().guard == before
        client.wait_until_synced(3, 10)
        client.update_policy(_make_policy(9.0))
        assert "back to revision 3" in _wait_for_guard(client, 4).reason, "revision 2 has these knobs; 3 was in force before the restart"
    engine.close()
    server.stop()


def test_compaction_keeps_the_last_good_revision(tmp_path, settings):
    server = RunningServer(settings.model_copy(update={"keep_revisions": 3}))
    engine = JudgingEngine(server.address, initial=GOOD_1)
    with ControlClient(server.address, author="tester") as client:
        client.wait_until_synced(1, 10)
        wait_for(lambda: server.server._guarded.find_good(server.server._store, _as_newest(server, 99)), "the acknowledgement to be stored")
        engine.answers = False
        for threshold in range(10, 18):
            client.update_policy(_make_policy(float(threshold)))
        assert client.get_policy(revision=1).revision == 1, "it is the only one known to be good"
    engine.close()
    server.stop()


def _as_newest(server, number: int):
    return dataclasses.replace(server.server._store.find_newest(), revision=number, policy=_make_policy(99.0))


def _look(policy: Policy, losses) -> str:
    thousandths, counts = np.unique(np.floor(losses * 1000 + 1e-9).astype(int), return_counts=True)
    pooled = Pooled(mismatch=LossCounts(tuple(zip(thousandths.tolist(), counts.tolist(), strict=True))))
    return find_excess(Evidence(tiers={(STABLE, "balanced"): pooled}), policy)


def _draw(rng, mean: float, size: int):
    """Answers of 16 tokens, correlated within an answer."""
    return rng.binomial(16, rng.beta(0.5, 0.5 * (1 - mean) / mean, size)) / 16


def test_how_soon_a_bad_policy_is_caught_and_that_a_good_one_is_not():
    rng, policy = np.random.default_rng(5), dataclasses.replace(GOOD_1, tiers=(Tier(name="balanced"), Tier(name="fast")))
    for bad in (0.10, 0.20, 0.40):
        needed = []
        for _ in range(100):
            losses = _draw(rng, bad, 2000)
            needed.append(next((n for n in range(2, 2001, 2) if _look(policy, losses[:n])), 2001))
        print(f"bound 0.05, true mean {bad}: caught within {np.median(needed):.0f} audited answers (median), {np.quantile(needed, 0.95):.0f} (95 %)")
        assert max(needed) <= 2000
    false_alarms = 0
    for _ in range(200):
        losses = _draw(rng, 0.05, 1000)
        false_alarms += any(_look(policy, losses[:n]) for n in range(10, 1001, 10))
    print(f"bound 0.05, true mean 0.05, confidence {policy.audit.confidence}: {false_alarms} of 200 policies refused in 1,000 audited answers")
    assert false_alarms <= 7, "one in a hundred may be; more than 7 of 200 comes by chance less than once in a thousand times"


def test_the_confidence_is_of_all_limits_together():
    assert get_guard_confidence(GOOD_1) == pytest.approx(0.99)
    several = dataclasses.replace(GOOD_1, tiers=(Tier(name="balanced"), Tier(name="fast")), audit=dataclasses.replace(AUDIT, max_nll_difference=0.1))
    assert get_guard_confidence(several) == pytest.approx(0.9975)
