"""Verdicts: a pass needs enough sound evidence of everything that is asked for, whatever else is there."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sedac.contract.v1 import evidence_pb2
from sedac.control.fleet.pooling import CANDIDATE, STABLE, Evidence, EvidenceBook, pool
from sedac.control.rollout.bounds import Baseline, Bounds
from sedac.control.rollout.judge import Verdict, judge
from sedac.policy.model import Policy, Tier

POLICY = Policy(enabled=True, tiers=(Tier(name="balanced"), Tier(name="fast")))
_int64 = st.integers(-(2**31), 2**40) | st.integers(0, 300)
_moments = st.builds(
    evidence_pb2.Moments, count=_int64, sum=st.floats() | st.floats(0, 100), sum_squares=st.floats() | st.floats(0, 1000)
) | st.integers(1, 500).map(lambda n: evidence_pb2.Moments(count=n, sum=n * 0.02, sum_squares=n * 0.0005))
_histograms = st.dictionaries(st.integers(0, 60) | st.integers(-2000, 2000), st.integers(1, 300) | _int64, max_size=3)
_evidence = st.builds(
    evidence_pb2.Evidence,
    side=st.sampled_from([STABLE, CANDIDATE]),
    tier=st.sampled_from(["balanced", "fast"]),
    num_requests=_int64,
    num_errors=st.just(0) | _int64,
    num_audit_failures=st.just(0) | _int64,
    token_seconds=_moments,
    mismatch_counts=_histograms,
    nll_difference_counts=_histograms,
)
_sound_evidence = st.builds(
    lambda side, tier, n, mismatch, difference, more: evidence_pb2.Evidence(
        **{
            "side": side,
            "tier": tier,
            "num_requests": n,
            "token_seconds": evidence_pb2.Moments(count=n, sum=n * 0.02, sum_squares=n * 0.0005),
            "mismatch_counts": {mismatch: n},
            "nll_difference_counts": {difference: n},
            **more,
        }
    ),
    st.sampled_from([STABLE, CANDIDATE]),
    st.sampled_from(["balanced", "fast"]),
    st.integers(0, 500),
    st.integers(0, 100),
    st.integers(-100, 100),
    st.dictionaries(st.sampled_from(["num_errors", "num_requests", "num_audit_failures"]), _int64, max_size=1)
    | st.dictionaries(st.just("token_seconds"), _moments, max_size=1)
    | st.dictionaries(st.sampled_from(["mismatch_counts", "nll_difference_counts"]), _histograms, max_size=1),
)
"""sound but for one field at most"""
_share = st.none() | st.floats(0, 1)
_bounds = st.builds(
    Bounds, max_mismatch=_share, max_nll_difference=_share, max_latency_ratio=st.none() | st.floats(0.1, 10), max_error_share=_share,
    confidence=st.floats(0.5, 0.999),
)  # fmt: skip


def _judge_candidate(evidence: Evidence, bounds: Bounds, **more) -> Verdict:
    return judge(evidence, bounds, bounds.get_limit_confidence(POLICY, together=True), side=CANDIDATE, together=True, **more)


def _sound(evidence: evidence_pb2.Evidence) -> bool:
    """Whether a piece of evidence is possible, told apart from how the service tells."""
    seconds = evidence.token_seconds
    counts = [evidence.num_requests, evidence.num_errors, evidence.num_audit_failures, seconds.count, seconds.sum, seconds.sum_squares]
    histograms = [(k, n, low) for found, low in ((evidence.mismatch_counts, 0), (evidence.nll_difference_counts, -1000)) for k, n in found.items()]
    return all(math.isfinite(c) and c >= 0 for c in counts) and all(n >= 0 and low <= k <= 1000 for k, n, low in histograms)


@given(
    st.lists(_evidence, max_size=4) | st.lists(_sound_evidence, min_size=2, max_size=6),
    _bounds,
    st.integers(1, 200),
    st.lists(st.just("engine e1 is away"), max_size=1),
)
@settings(max_examples=400, deadline=None)
def test_nothing_passes_without_enough_sound_evidence(reported, bounds, least, unheard):
    verdict = _judge_candidate(pool([("e1", e) for e in reported]), bounds, min_requests=least, unheard=unheard)
    assert verdict.reason
    if verdict.kind != "pass":
        return
    assert not unheard
    assert all(map(_sound, reported))
    candidate = [e for e in reported if e.side == CANDIDATE]
    for bound, name in ((bounds.max_mismatch, "mismatch_counts"), (bounds.max_nll_difference, "nll_difference_counts")):
        if bound is not None:
            losses = [(k, n) for e in candidate for k, n in getattr(e, name).items()]
            num = sum(n for _, n in losses)
            assert num >= least
            assert sum(k * n for k, n in losses) / num / 1000 <= bound + 1e-9
    assert sum(e.num_requests for e in candidate) >= (least if bounds.max_mismatch is None and bounds.max_nll_difference is None else 1)
    if bounds.max_error_share is not None:
        assert sum(e.num_errors for e in candidate) <= bounds.max_error_share * sum(e.num_requests for e in candidate) + 1e-9
    if bounds.max_latency_ratio is not None:
        for side in (STABLE, CANDIDATE):
            assert sum(e.token_seconds.count for e in reported if e.side == side) >= least


def _make(**more) -> evidence_pb2.Evidence:
    seconds = evidence_pb2.Moments(count=200, sum=4.0, sum_squares=0.1)
    fields = {"tier": "balanced", "num_requests": 200, "token_seconds": seconds, "mismatch_counts": {10: 200}, "nll_difference_counts": {5: 200}}
    return evidence_pb2.Evidence(**{**fields, **more})


def _judge(*reported, baseline=Baseline(), **bounds):  # noqa: B008  frozen
    found = pool([(f"e{i}", e) for i, e in enumerate(reported)])
    return _judge_candidate(found, Bounds(**{"max_mismatch": 0.05, **bounds}), min_requests=100, baseline=baseline)


def test_the_confidence_is_of_all_limits_together():
    bounds = Bounds(max_mismatch=0.05, max_nll_difference=0.1, max_error_share=0.1, confidence=0.9)
    assert bounds.get_limit_confidence(POLICY, together=True) == pytest.approx(1 - 0.1 / 7), "two losses of two tiers and of both, and one more"
    assert bounds.get_limit_confidence(POLICY, together=False) == pytest.approx(1 - 0.1 / 5)
    assert bounds.get_limit_confidence(Policy(), together=True) == pytest.approx(1 - 0.1 / 3), "all of one tier are that tier's"
    assert Bounds(confidence=0.9).get_limit_confidence(POLICY, together=True) == 0.9


def test_what_was_counted_before_the_step_is_no_sample_but_counts_for_the_limits():
    good, bad = _make(side=CANDIDATE), _make(side=CANDIDATE, mismatch_counts={300: 200})
    assert _judge(good).kind == "pass"
    later = _judge(good, baseline=Baseline(num_mismatch=150))
    assert (later.kind, "too few audited answers in this step for mismatch: 50" in later.reason) == ("none", True)
    assert _judge(bad, baseline=Baseline(num_mismatch=200)).kind == "breach"


def test_one_bad_tier_is_a_breach_though_all_together_are_good():
    verdict = _judge(
        _make(side=CANDIDATE, num_requests=20000, mismatch_counts={1: 20000}), _make(side=CANDIDATE, tier="fast", mismatch_counts={300: 200})
    )
    assert (verdict.kind, verdict.reason.startswith("tier fast: mismatch is over")) == ("breach", True)


def test_a_breach_counts_though_other_evidence_is_broken():
    broken = _make(side=CANDIDATE, token_seconds=evidence_pb2.Moments(count=1, sum=math.nan))
    assert _judge(_make(side=CANDIDATE, mismatch_counts={300: 200}), broken).kind == "breach"
    assert _judge(_make(side=CANDIDATE), broken).kind == "none"


def test_a_mean_over_the_bound_that_proves_nothing_is_no_verdict():
    verdict = _judge(_make(side=CANDIDATE, mismatch_counts={0: 94, 1000: 6}))
    assert (verdict.kind, "too close to tell" in verdict.reason) == ("none", True)


def test_latency_is_held_against_the_policy_in_force_since_the_roll_out_began():
    slow = evidence_pb2.Moments(count=400, sum=400 * 0.1, sum_squares=400 * 0.0101)
    stable, candidate = _make(side=STABLE, num_requests=400, token_seconds=slow), _make(side=CANDIDATE)
    assert _judge(stable, candidate, max_latency_ratio=1.5).kind == "pass"
    assert _judge(candidate, max_latency_ratio=1.5).kind == "none", "nothing to compare with"
    since = Baseline(stable_token_seconds=(200, slow.sum - 200 * 0.005, slow.sum_squares - 200 * 0.00003))
    assert _judge(stable, candidate, baseline=since, max_latency_ratio=1.5).kind == "breach"


def test_mostly_failed_audits_are_no_verdict():
    assert "audits gave no result" in _judge(_make(side=CANDIDATE, num_audit_failures=201)).reason


def test_the_book_keeps_what_a_restarted_engine_lost_and_drops_what_is_not_in_force():
    book = EvidenceBook()
    book.expect(3, POLICY, 7, POLICY)
    assert book.take("e1", [_make(revision=3), _make(side=CANDIDATE, rollout=7)])
    assert not book.take("e1", [_make(revision=3), _make(side=CANDIDATE, rollout=7)]), "nothing new"
    book.take("e1", [_make(revision=3, num_requests=5), _make(revision=2), _make(side=CANDIDATE, rollout=6), _make(revision=3, tier="other")])
    found = pool(book.list())
    assert {key: pooled.num_requests for key, pooled in found.tiers.items()} == {(STABLE, "balanced"): 205, (CANDIDATE, "balanced"): 200}
    book.expect(3, POLICY, 8, POLICY)
    assert set(pool(book.list()).tiers) == {(STABLE, "balanced")}
    book.expect(4, POLICY, 8, POLICY)
    assert not book.list()
