"""Statistics of certification: is the mean loss of all requests at most eps, given the losses of n of them?

A p-value here is of the hypothesis "the mean loss is above eps": where that is true, p <= delta happens in at most delta of all
samples. Losses are one number per request, each in [0, 1], drawn independently of one another. Called by `certify`; numbers in,
numbers out: it measures nothing and reads no file. N requests; leading dimensions `...` are independent samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, cast, get_args

import numpy as np
from scipy.stats import beta, binom
from sedac.errors import ConfigError

Procedure = Literal["wsr", "hb"]
Array = np.ndarray[Any, np.dtype[np.float64]]

MAX_NEEDED = 1 << 22
"""Number of requests up to which `get_num_needed` runs the test itself. Beyond that it extrapolates."""
_STEPS = 50  # of bisection: limits are exact to 1e-15


def read_procedure(name: str) -> Procedure:
    """Return `name` as a procedure.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in get_args(Procedure):
        raise ConfigError(f"procedure {name!r} is unknown; use {' or '.join(get_args(Procedure))}")
    return cast(Procedure, name)


def get_p_value(losses_N: Any, eps: float, procedure: Procedure, delta: float) -> Array:
    """Return the p-value (...) of losses (..., N) by `procedure`.

    Raises:
        ValueError: a loss is outside [0, 1] or no number, or there is none.
    """
    return get_wsr_p_value(losses_N, eps, delta) if procedure == "wsr" else get_hb_p_value(losses_N, eps)


def get_upper_limit(losses_N: Any, delta: float, procedure: Procedure) -> Array:
    """Return the smallest eps (...) that passes at `delta`: the mean of all requests is above it in at most delta of all samples.

    That holds for losses looked at by themselves. Of a member that was chosen by its losses, certification promises eps alone.

    With wsr it may lie below the mean of the losses themselves: the capital counts at its highest, wherever that was.

    Raises:
        ValueError: see `get_p_value`.
    """
    losses = _check(losses_N)
    low, high = np.zeros(losses.shape[:-1]), np.ones(losses.shape[:-1])
    for _ in range(_STEPS):
        middle = (low + high) / 2
        p = _get_wsr(losses, middle, delta) if procedure == "wsr" else _get_hb(losses, middle)
        passes = p <= delta
        low, high = np.where(passes, low, middle), np.where(passes, middle, high)
    return high


def get_hb_p_value(losses_N: Any, eps: float) -> Array:
    """Return the Hoeffding-Bentkus p-value (...) of losses (..., N).

    Source: Bates, Angelopoulos, Lei, Malik, Jordan 2021, "Distribution-free, risk-controlling prediction sets", theorems 2 and 3;
    Angelopoulos, Bates, Candes, Jordan, Lei 2021, "Learn then test", proposition 1.

    Raises:
        ValueError: see `get_p_value`.
    """
    losses = _check(losses_N)
    return _get_hb(losses, np.full(losses.shape[:-1], eps))


def get_binomial_p_value(losses_N: Any, eps: float) -> Array:
    """Return the exact p-value (...) of losses (..., N) that are all 0 or 1: P(Bin(N, eps) <= their sum).

    That losses can only be 0 or 1 must be known before they are seen.

    Raises:
        ValueError: a loss is neither 0 nor 1, or there is none.
    """
    losses = _check_binary(losses_N)
    return np.asarray(binom.cdf(losses.sum(axis=-1), losses.shape[-1], eps))


def get_binomial_upper_limit(losses_N: Any, delta: float) -> Array:
    """Return the exact upper confidence limit (...) of losses (..., N) that are all 0 or 1 (Clopper and Pearson 1934, one-sided).

    Raises:
        ValueError: see `get_binomial_p_value`.
    """
    losses = _check_binary(losses_N)
    ones, n = losses.sum(axis=-1), losses.shape[-1]
    return np.where(ones == n, 1.0, beta.ppf(1 - delta, ones + 1, np.maximum(n - ones, 1)))


def get_wsr_p_value(losses_N: Any, eps: float, delta: float) -> Array:
    """Return the p-value (...) of losses (..., N), in the order in which they were drawn, by betting against a mean above eps.

    It is 1 / (the most that the capital ever was). The bets are made for a test at `delta`; the p-value holds at any level.

    Source: Waudby-Smith, Ramdas 2024, "Estimating means of bounded random variables by betting"; the one-sided form with these
    bets: Bates et al. 2021 (as above), proposition 5.

    Raises:
        ValueError: see `get_p_value`.
    """
    losses = _check(losses_N)
    return _get_wsr(losses, np.full(losses.shape[:-1], eps), delta)


def find_last_rejected(p_values: Iterable[float], delta: float) -> int | None:
    """Return the index of the last member whose hypothesis is rejected, in a fixed sequence from the safest; None: not even the first.

    Testing stops at the first that is not rejected, so `p_values` may be made one by one. What is returned is the last one
    *rejected*: the first one not rejected is the very one for which nothing was shown.

    Source: Angelopoulos et al. 2021, "Learn then test", fixed sequence testing (Maurer, Hothorn, Lehmacher 1995).
    """
    last = None
    for i, p in enumerate(p_values):
        if not p <= delta:
            break
        last = i
    return last


def get_num_needed(losses_N: Any, eps: float, delta: float, procedure: Procedure) -> int | None:
    """Estimate how many requests with losses like these (N,) pass; None: no number does, as their mean is not below eps.

    Runs the test on the losses repeated; beyond MAX_NEEDED requests it uses the number at which bets at the losses' own variance
    pay (wsr) or Hoeffding's bound suffices (hb).

    Raises:
        ValueError: see `get_p_value`.
    """
    losses = _check(losses_N)
    mean = float(losses.mean())
    if mean >= eps:
        return None

    def passes(num_requests: int) -> bool:
        """Return whether so many requests with losses like these would pass."""
        return bool(get_p_value(np.resize(losses, num_requests), eps, procedure, delta) <= delta)

    high = 1
    while not passes(high):
        high *= 2
        if high > MAX_NEEDED:
            log = math.log(1 / delta)
            return math.ceil(
                2 * log * float(losses.var()) / (eps - mean) ** 2 if procedure == "wsr" else log / float(_h1(np.array(mean), np.array(eps)))
            )
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high


def _get_wsr(losses: Array, eps: Array, delta: float) -> Array:
    """mu_i = (1/2 + sum x) / (i + 1), s2_i = (1/4 + sum (x_j - mu_j)^2) / (i + 1), nu_i = min(1, sqrt(2 ln(1/delta) / (N s2_{i-1})))."""
    n = losses.shape[-1]
    index = np.arange(2, n + 2)
    mean = (0.5 + np.cumsum(losses, axis=-1)) / index
    variance = (0.25 + np.cumsum((losses - mean) ** 2, axis=-1)) / index
    before = np.concatenate([np.full((*losses.shape[:-1], 1), 0.25), variance[..., :-1]], axis=-1)
    bet = np.minimum(1.0, np.sqrt(2 * math.log(1 / delta) / (n * before)))
    with np.errstate(divide="ignore"):  # a capital of 0, where a loss of 1 meets a bet of 1 against eps = 0
        log_capital = np.cumsum(np.log1p(-bet * (losses - eps[..., None])), axis=-1)
    return np.asarray(np.exp(-np.maximum(log_capital.max(axis=-1), 0.0)))


def _get_hb(losses: Array, eps: Array) -> Array:
    n, total = losses.shape[-1], losses.sum(axis=-1)
    hoeffding = np.exp(-n * _h1(np.minimum(total / n, eps), eps))
    bentkus = math.e * binom.cdf(np.ceil(total), n, eps)
    return np.minimum(np.minimum(hoeffding, bentkus), 1.0)


def _h1(a: Array, b: Array) -> Array:
    """a ln(a/b) + (1-a) ln((1-a)/(1-b)) for a <= b, in nats."""
    with np.errstate(divide="ignore", invalid="ignore"):
        left = np.where(a > 0, a * np.log(a / b), 0.0)
        right = np.where(a < 1, (1 - a) * np.log((1 - a) / (1 - b)), 0.0)
    return np.asarray(left + right)


def _check(losses_N: Any) -> Array:
    losses = np.asarray(losses_N, dtype=np.float64)
    if losses.ndim == 0 or losses.shape[-1] == 0:
        raise ValueError(f"losses of shape {losses.shape}: give at least one per sample")
    if not ((losses >= 0) & (losses <= 1)).all():
        raise ValueError(f"losses go from {losses.min()} to {losses.max()}; each must be a number in [0, 1]")
    return losses


def _check_binary(losses_N: Any) -> Array:
    losses = _check(losses_N)
    if not ((losses == 0) | (losses == 1)).all():
        raise ValueError("the exact binomial test takes losses of 0 and 1 alone; use wsr or hb")
    return losses
