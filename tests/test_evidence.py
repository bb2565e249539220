"""Limits of means that hold at every look: how often they are wrong, and how soon they see what is there."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sedac.contract.evidence import LossCounts, Moments, exceeds, get_limits, get_ratio_limit

NUM_RUNS, NUM_REQUESTS, EVERY = 1000, 1000, 10


def _get_most(num_runs: int, share: float) -> int:
    """Most failures out of `num_runs` that a true share of failures allows, but for one time in a thousand."""
    return math.floor(num_runs * share + 3.09 * math.sqrt(num_runs * share * (1 - share)))


def _count(losses) -> LossCounts:
    """Count losses as engines do: in thousandths rounded down."""
    thousandths, counts = np.unique(np.floor(losses * 1000 + 1e-9).astype(int), return_counts=True)
    return LossCounts(tuple(zip(thousandths.tolist(), counts.tolist(), strict=True)))


def _draw(rng, kind: str, mean: float, size):
    if kind == "bernoulli":
        return (rng.random(size) < mean).astype(float)
    if kind == "answers":  # 16 tokens each, correlated within an answer
        return rng.binomial(16, rng.beta(0.5, 0.5 * (1 - mean) / mean, size)) / 16
    return rng.beta(1, (1 - mean) / mean, size)


@pytest.mark.parametrize(("kind", "confidence"), [("bernoulli", 0.9), ("bernoulli", 0.99), ("answers", 0.9), ("answers", 0.99)])
def test_limits_looked_at_again_and_again_are_wrong_no_more_often_than_they_say(kind, confidence):
    rng, mean = np.random.default_rng(7), 0.05
    losses = _draw(rng, kind, mean, (NUM_RUNS, NUM_REQUESTS))
    floors = np.floor(losses * 1000 + 1e-9).astype(int)
    too_high = 0
    for run in floors:
        histogram: dict[int, int] = {}
        for begin in range(0, NUM_REQUESTS, EVERY):
            for loss in run[begin : begin + EVERY].tolist():
                histogram[loss] = histogram.get(loss, 0) + 1
            if exceeds(LossCounts(tuple(histogram.items())), mean, confidence):
                too_high += 1
                break
    print(f"{kind}: lower limit at {confidence} over the true mean in {too_high} of {NUM_RUNS} runs, looked at {NUM_REQUESTS // EVERY} times each")
    assert too_high <= _get_most(NUM_RUNS, 1 - confidence)


def test_upper_limits_are_wrong_no_more_often_than_they_say():
    rng, wrong = np.random.default_rng(8), 0
    for _ in range(200):
        losses = _draw(rng, "answers", 0.05, 400)
        wrong += any(get_limits(_count(losses[:n]), 0.9).upper < 0.05 for n in (20, 50, 100, 200, 400))
    print(f"upper limit at 0.9 under the true mean in {wrong} of 200 runs")
    assert wrong <= _get_most(200, 0.1)


@pytest.mark.parametrize("kind", ["bernoulli", "answers", "beta"])
def test_a_mean_of_twice_the_bound_is_seen_soon(kind):
    rng, needed = np.random.default_rng(9), []
    for _ in range(200):
        losses = _draw(rng, kind, 0.10, 2000)
        needed.append(next((n for n in range(5, 2001, 5) if exceeds(_count(losses[:n]), 0.05, 0.99)), 2001))
    median, most = np.quantile(needed, [0.5, 0.95])
    print(f"{kind}: a mean of 0.10 is over 0.05 at 0.99 after {median:.0f} requests (median), {most:.0f} (95 % of the runs)")
    assert most <= 2000, "it is seen at all"


@given(
    st.dictionaries(st.integers(0, 1000), st.integers(1, 10**6), max_size=30),
    st.dictionaries(st.integers(0, 1000), st.integers(1, 10**6), max_size=30),
    st.floats(0.5, 0.999),
)
@settings(max_examples=100, deadline=None)
def test_limits_hold_the_mean_between_them_and_counts_add_up_in_any_order(first, second, confidence):
    one, other = LossCounts.from_mapping(first, 0, 1), LossCounts.from_mapping(second, 0, 1)
    both = one + other
    assert both == other + one
    assert both.num_requests == one.num_requests + other.num_requests
    limits = get_limits(both, confidence)
    assert get_limits(other + one, confidence) == limits
    if not both.items:
        assert (limits.lower, limits.upper) == (0, 1)
        assert math.isnan(limits.mean)
        return
    assert 0 <= limits.lower <= limits.mean <= limits.upper <= 1
    for bound in (limits.lower * 0.999, min(1.0, limits.lower * 1.001 + 1e-9)):
        assert exceeds(both, bound, confidence) == (bound < limits.lower), "one look agrees with the limit"


def test_limits_are_conservative_to_the_rounding():
    limits = get_limits(LossCounts(((0, 10**8),)), 0.99)
    assert (limits.lower, limits.mean) == (0, 0)
    assert limits.upper >= 0.001, "0 thousandths may be nearly one"
    ones = get_limits(LossCounts(((1000, 10**6),)), 0.99)
    assert (ones.mean, ones.upper) == (1, 1)
    assert get_limits(LossCounts(((200, 10**8),)), 0.99).lower < 0.2 < 0.201 < get_limits(LossCounts(((200, 10**8),)), 0.99).upper


def test_losses_may_be_negative():
    rng = np.random.default_rng(1)
    limits = get_limits(_count(rng.normal(-0.02, 0.05, 2000)), 0.99, -1, 1)
    print(limits)
    assert -0.04 < limits.lower < -0.02 < limits.upper < 0
    with pytest.raises(ValueError, match=r"-3 thousandths is outside 0\.\.1000"):
        LossCounts.from_mapping({-3: 1}, 0, 1)
    with pytest.raises(ValueError, match="a count is not negative"):
        LossCounts.from_mapping({3: -1}, 0, 1)


def _sum(values) -> Moments:
    return Moments(len(values), float(values.sum()), float((values**2).sum()))


def test_the_limit_of_a_ratio_is_wrong_no_more_often_than_it_says_and_sees_a_difference():
    rng, wrong, seen = np.random.default_rng(3), 0, []
    for _ in range(500):
        stable, candidate = rng.lognormal(-4, 0.6, (2, 2000))
        looks = range(50, 2001, 50)
        wrong += any(get_ratio_limit(_sum(candidate[:n]), _sum(stable[:n]), 0.95) > 1 for n in looks)
        seen.append(next((n for n in looks if get_ratio_limit(_sum(candidate[:n] * 1.3), _sum(stable[:n]), 0.95) > 1), 2001))
    print(f"limit over the true ratio in {wrong} of 500 runs of 40 looks at 0.95; 1.3 against 1 seen after {np.median(seen):.0f} requests (median)")
    assert wrong <= _get_most(500, 0.05)
    assert np.median(seen) < 2001
    assert get_ratio_limit(Moments(), _sum(stable), 0.95) == get_ratio_limit(_sum(candidate), Moments(5, 0.0, 0.0), 0.95) == 0


@pytest.mark.parametrize(
    "bad", [Moments(1, math.nan, 1), Moments(1, 1, math.inf), Moments(-1, 1, 1), Moments(2, -1, 1), Moments(0, 1, 1), Moments(2, 4, 1)]
)
def test_impossible_sums_are_told(bad):
    assert bad.find_problem()
    assert not Moments(2, 2, 2).find_problem()
