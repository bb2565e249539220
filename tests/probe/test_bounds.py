"""The statistics of certification against scipy, and their promise on simulated families of known risk.

A simulated family: members from safe to fast, whose true risks rise through eps; a request's losses under all members come from one
uniform number, as the same request is answered by all. One run certifies one member; it is a violation when that one's true risk is
above eps. The known wrong variant goes through the very same harness.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
from scipy.stats import beta, binom, binomtest
from sedac_probes.certification import bounds

RUNS, N, EPS, DELTA = 2000, 500, 0.05, 0.05
RISKS = (0.01, 0.02, 0.0505, 0.052, 0.06)
"""of the members; the third is the hardest: hardly above eps"""
DISTRIBUTIONS = ("0/1", "beta", "mixture")
PROCEDURES = ("wsr", "hb", "binomial")


@functools.cache
def draw_losses(distribution: str) -> np.ndarray:
    """Losses (members, runs, requests) with mean RISKS[k] exactly."""
    uniform = np.random.default_rng(7).random((RUNS, N))
    members = []
    for risk in RISKS:
        if distribution == "0/1":
            losses = (uniform > 1 - risk).astype(float)
        elif distribution == "beta":  # most requests a little wrong
            grid = np.linspace(0, 1, 20001)
            losses = np.interp(uniform, grid, beta.ppf(grid, 1.5, 1.5 / risk - 1.5))
        else:  # nine of ten requests nearly untouched (risk / 3 at most), the others share the rest, up to their whole answer
            quiet = 0.9 * risk / 6
            loud = (risk - quiet) / 0.1
            losses = np.where(uniform < 0.9, uniform / 0.9 * risk / 3, (uniform > 1 - 0.1 * loud).astype(float))
        members.append(losses)
    return np.stack(members)


@functools.cache
def get_p_values(procedure: str, distribution: str) -> np.ndarray:
    """(members, runs)."""
    losses = draw_losses(distribution)
    if procedure == "binomial":
        return bounds.get_binomial_p_value(losses, EPS)
    return bounds.get_p_value(losses, EPS, procedure, DELTA)


def first_not_rejected(p_values, delta):
    """The widely copied mistake: the member at which testing stops, not the one before."""
    index = next((i for i, p in enumerate(p_values) if p > delta), len(p_values) - 1)
    return index if p_values[0] <= delta else None


def count(find, procedure: str, distribution: str) -> tuple[int, int]:
    """(violations, runs in which anything was certified)."""
    chosen = [find(p.tolist(), DELTA) for p in get_p_values(procedure, distribution).T]
    assert len(chosen) == RUNS
    found = [k for k in chosen if k is not None]
    return sum(RISKS[k] > EPS for k in found), len(found)


def describe(name: str, procedure: str, distribution: str, violations: int, certified: int) -> str:
    interval = binomtest(violations, RUNS).proportion_ci(0.95, method="exact")
    rate = f"{violations / RUNS:6.2%} [{interval.low:6.2%}, {interval.high:6.2%}]"
    return f"{name:>18} {procedure:>9} {distribution:>8}: violated in {rate} of {RUNS} runs, certified in {certified / RUNS:.1%}"


CASES = [c for c in itertools.product(PROCEDURES, DISTRIBUTIONS) if c[0] != "binomial" or c[1] == "0/1"]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_simulated_risks_are_those_that_are_claimed(distribution):
    losses = draw_losses(distribution)
    assert losses.min() >= 0
    assert losses.max() <= 1
    error = losses.std(axis=(1, 2)) / (RUNS * N) ** 0.5
    assert (abs(losses.mean(axis=(1, 2)) - RISKS) < 4 * error).all()


@pytest.mark.parametrize(("procedure", "distribution"), CASES)
def test_last_rejected_violates_at_most_delta(procedure, distribution):
    violations, certified = count(bounds.find_last_rejected, procedure, distribution)
    print("\n" + describe("last rejected", procedure, distribution, violations, certified))
    assert violations / RUNS <= DELTA
    assert certified / RUNS > 0.9, "a procedure that certifies nothing violates nothing"


@pytest.mark.parametrize(("procedure", "distribution"), CASES)
def test_first_not_rejected_violates(procedure, distribution):
    violations, certified = count(first_not_rejected, procedure, distribution)
    print("\n" + describe("first not rejected", procedure, distribution, violations, certified))
    assert binomtest(violations, RUNS).proportion_ci(0.95, method="exact").low > DELTA


@pytest.mark.parametrize("procedure", ["wsr", "hb"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_upper_limit_covers_the_risk_and_inverts_the_test(procedure, distribution):
    losses = draw_losses(distribution)
    for k, risk in enumerate(RISKS):
        limits = bounds.get_upper_limit(losses[k, :400], DELTA, procedure)
        missed = int((limits < risk).sum())
        assert binomtest(missed, 400, DELTA, alternative="greater").pvalue > 1e-3, f"{missed} of 400 limits are below the risk {risk}"
        assert ((limits <= EPS) == (bounds.get_p_value(losses[k, :400], EPS, procedure, DELTA) <= DELTA)).all()


def test_p_values_equal_scipys_and_the_written_formula():
    rng = np.random.default_rng(3)
    for n, eps in ((60, 0.1), (500, 0.05), (1000, 0.01)):
        ones = (rng.random((20, n)) < eps * 0.6).astype(float)
        wanted = [binomtest(int(row.sum()), n, eps, alternative="less").pvalue for row in ones]
        np.testing.assert_allclose(bounds.get_binomial_p_value(ones, eps), wanted, rtol=1e-12)
        limits = [binomtest(int(row.sum()), n, alternative="less").proportion_ci(0.95, method="exact").high for row in ones]
        np.testing.assert_allclose(bounds.get_binomial_upper_limit(ones, 0.05), limits, rtol=1e-9)
        losses = rng.beta(1, 20, (20, n))
        for row, hb, wsr in zip(losses, bounds.get_hb_p_value(losses, eps), bounds.get_wsr_p_value(losses, eps, 0.05), strict=True):
            assert hb == pytest.approx(write_hb(row, eps), rel=1e-9)
            assert wsr == pytest.approx(write_wsr(row, eps, 0.05), rel=1e-9)
    assert bounds.get_binomial_upper_limit([1.0, 1.0], 0.05) == 1.0


def write_hb(losses, eps):
    """Hoeffding-Bentkus, term by term."""
    n, mean = len(losses), sum(losses) / len(losses)
    a = min(mean, eps)
    h1 = (a * np.log(a / eps) if a else 0.0) + (1 - a) * np.log((1 - a) / (1 - eps))
    return min(np.exp(-n * h1), np.e * binom.cdf(np.ceil(n * mean), n, eps), 1.0)


def write_wsr(losses, eps, delta):
    """The betting test, request by request."""
    n, capital, most, total, squares = len(losses), 1.0, 1.0, 0.0, 0.0
    variance = 0.25
    for i, x in enumerate(losses, start=1):
        capital *= 1 - min(1.0, np.sqrt(2 * np.log(1 / delta) / (n * variance))) * (x - eps)
        most = max(most, capital)
        total += x
        squares += (x - (0.5 + total) / (i + 1)) ** 2
        variance = (0.25 + squares) / (i + 1)
    return 1 / most


@pytest.mark.parametrize(
    ("n", "eps", "most"), [(300, 0.01, 0), (1000, 0.01, 4), (5000, 0.01, 38), (1000, 0.02, 12), (300, 0.05, 8), (1000, 0.05, 38)]
)
def test_binomial_passes_up_to_the_known_number_of_mismatches(n, eps, most):
    ones = np.zeros((2, n))
    ones[0, :most] = 1
    ones[1, : most + 1] = 1
    assert (bounds.get_binomial_p_value(ones, eps) <= 0.05).tolist() == [True, False]


def test_sequence_stops_at_the_first_that_is_not_rejected():
    assert bounds.find_last_rejected([0.001, 0.01, 0.2, 0.001], 0.05) == 1
    assert bounds.find_last_rejected([0.06, 0.001], 0.05) is None
    assert bounds.find_last_rejected([0.05], 0.05) == 0
    assert bounds.find_last_rejected([float("nan")], 0.05) is None
    assert bounds.find_last_rejected([], 0.05) is None
    asked = iter([0.01, 0.5, 0.01])
    assert bounds.find_last_rejected(asked, 0.05) == 0
    assert list(asked) == [0.01], "members after the first failure are not even looked at"


@pytest.mark.parametrize("procedure", ["wsr", "hb"])
def test_number_needed_passes_and_half_of_it_does_not(procedure):
    losses = np.random.default_rng(1).beta(1, 24, 200)
    needed = bounds.get_num_needed(losses, 0.05, 0.01, procedure)
    assert needed is not None
    assert needed > 200
    assert bounds.get_p_value(np.resize(losses, needed), 0.05, procedure, 0.01) <= 0.01
    assert bounds.get_p_value(np.resize(losses, needed // 2), 0.05, procedure, 0.01) > 0.01
    assert bounds.get_num_needed(losses, 0.03, 0.01, procedure) is None, "a mean above eps passes with no number of requests"
    assert bounds.get_num_needed(np.zeros(3), 0.05, 0.05, procedure) in range(59, 120), "no loss at all: about ln(1/delta) / eps"
    close = bounds.get_num_needed(losses, losses.mean() * 1.0005, 0.01, procedure)
    assert close is not None
    assert close > bounds.MAX_NEEDED


@pytest.mark.parametrize("bad", [[], [0.1, 1.1], [-0.1], [0.1, float("nan")]])
def test_losses_outside_the_unit_interval_are_refused(bad):
    for compute in (
        lambda x: bounds.get_hb_p_value(x, 0.1),
        lambda x: bounds.get_wsr_p_value(x, 0.1, 0.05),
        lambda x: bounds.get_upper_limit(x, 0.1, "hb"),
    ):
        with pytest.raises(ValueError, match="losses"):
            compute(bad)
    with pytest.raises(ValueError, match="0 and 1"):
        bounds.get_binomial_p_value([0.5], 0.1)
