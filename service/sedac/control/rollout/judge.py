"""The judge of evidence: does a policy pass its bounds, is it shown to be over one, or can neither be told? Pure functions.

The guard and the roll-outs both ask it. A breach needs a limit that holds at every look to be over its bound; a pass needs enough of
every number that is asked for, all of it sound, from every engine, and every mean within its bound. Whatever is in between is no verdict,
so that nothing is promoted for lack of evidence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from sedac.contract.evidence import LossCounts, Moments, exceeds, get_limits, get_ratio_limit
from sedac.contract.v1 import evidence_pb2
from sedac.control.fleet.pooling import STABLE, Evidence, Pooled
from sedac.control.rollout.bounds import Baseline, Bounds

_MAX_SHOWN = 3
_NOTHING_BEFORE = Baseline()


@dataclass(frozen=True)
class Verdict:
    """What evidence says of a policy, and why."""

    kind: Literal["breach", "none", "pass"]
    reason: str


def judge(
    evidence: Evidence,
    bounds: Bounds,
    confidence: float,
    *,
    side: evidence_pb2.Side,
    together: bool,
    baseline: Baseline = _NOTHING_BEFORE,
    min_requests: int = 1,
    unheard: Sequence[str] = (),
) -> Verdict:
    """Return the verdict on the policy of one side.

    Args:
        evidence: all that was gathered.
        bounds: what the policy is held against.
        confidence: of each limit alone (see `Bounds.get_limit_confidence`).
        side: whose policy is judged.
        together: whether the losses of all tiers together are held against their bounds too, beside those of each tier.
        baseline: what had been counted before; it is no sample.
        min_requests: how many samples since then a pass needs.
        unheard: which engines are missing from the evidence, and why.
    """
    judged, stable_seconds = evidence.get_side(side), _get_stable_seconds(evidence, baseline)
    groups = [(f"tier {tier}", pooled) for (found, tier), pooled in sorted(evidence.tiers.items()) if found == side]
    if together:
        groups.append(("all tiers", judged))
    if breach := _find_loss(groups, bounds, confidence) or _find_excess(judged, stable_seconds, bounds, confidence):
        return Verdict("breach", breach)
    troubles = [*unheard, *evidence.problems]
    if troubles:
        more = f" and {len(troubles) - _MAX_SHOWN} more" if len(troubles) > _MAX_SHOWN else ""
        return Verdict("none", "; ".join(troubles[:_MAX_SHOWN]) + more)
    if missing := _find_missing(judged, stable_seconds, bounds, min_requests, baseline):
        return Verdict("none", missing)
    if over := _find_doubt(judged, stable_seconds, bounds):
        return Verdict("none", over)
    return Verdict("pass", _describe(judged, stable_seconds, bounds))


def _find_loss(groups: Sequence[tuple[str, Pooled]], bounds: Bounds, confidence: float) -> str:
    """Return which group of audited answers is known to lose too much; empty: none is."""
    for name, bound, low in bounds.get_losses():
        for where, pooled in groups:
            counts = getattr(pooled, name)
            if exceeds(counts, bound, confidence, low, 1):
                lower = get_limits(counts, confidence, low, 1).lower
                return f"{where}: {_say(name)} is over {lower:.4g}, its bound is {bound:g} ({counts.num_requests} audited, mean {counts.mean:.4g})"
    return ""


def _find_excess(judged: Pooled, stable_seconds: Moments, bounds: Bounds, confidence: float) -> str:
    """Return what else is known to be over its bound; empty: nothing is."""
    if bounds.max_error_share is not None and exceeds(_get_errors(judged), bounds.max_error_share, confidence):
        return f"{judged.num_errors} of {judged.num_requests} requests ended in an error, at most {bounds.max_error_share:g} of them may"
    if bounds.max_latency_ratio is not None:
        ratio = get_ratio_limit(judged.token_seconds, stable_seconds, confidence)
        if ratio > bounds.max_latency_ratio:
            return f"seconds per token are over {ratio:.4g} times those of the policy in force, the bound is {bounds.max_latency_ratio:g}"
    return ""


def _find_missing(judged: Pooled, stable_seconds: Moments, bounds: Bounds, min_requests: int, baseline: Baseline) -> str:
    if judged.num_requests == 0:
        return "no evidence of the candidate: no request has finished under it"
    samples = [
        (name, getattr(judged, name).num_requests - getattr(baseline, f"num_{name}"), "audited answers") for name, _, _ in bounds.get_losses()
    ] or [("requests", judged.num_requests - baseline.num_finished, "finished requests")]
    for name, found, of in samples:
        if found < min_requests:
            return f"too few {of} in this step for {_say(name)}: {max(0, found)}, {min_requests} are needed"
    if bounds.max_latency_ratio is not None:
        for whose, moments in (("candidate", judged.token_seconds), ("policy in force", stable_seconds)):
            if problem := moments.find_problem():
                return f"seconds per token of the {whose}: {problem}"
            if moments.count < max(2, min_requests):
                return f"too few requests of the {whose} with seconds per token: {moments.count}, {max(2, min_requests)} are needed"
            if moments.mean < 1e-12:
                return f"the seconds per token of the {whose} are all 0, so that there is no ratio"
    num_audited = judged.nll_difference.num_requests
    if judged.num_audit_failures > num_audited and bounds.get_losses():
        return f"{judged.num_audit_failures} audits gave no result, {num_audited} did; see the engines' logs"
    return ""


def _find_doubt(judged: Pooled, stable_seconds: Moments, bounds: Bounds) -> str:
    for name, mean, bound in _get_means(judged, stable_seconds, bounds):
        if not (math.isfinite(mean) and mean <= bound):  # NaN too
            return f"{name} is {mean:.4g} on average, its bound is {bound:g}; too close to tell: gather more, or decide"
    return ""


def _describe(judged: Pooled, stable_seconds: Moments, bounds: Bounds) -> str:
    found = [f"{name} {mean:.4g} (bound {bound:g})" for name, mean, bound in _get_means(judged, stable_seconds, bounds)]
    return ", ".join([f"{judged.num_requests} requests", f"{judged.nll_difference.num_requests} audited", *found])


def _get_means(judged: Pooled, stable_seconds: Moments, bounds: Bounds) -> Iterable[tuple[str, float, float]]:
    for name, bound, _ in bounds.get_losses():
        yield _say(name), getattr(judged, name).mean, bound
    if bounds.max_error_share is not None:
        yield "the share of errors", _get_errors(judged).mean, bounds.max_error_share
    if bounds.max_latency_ratio is not None:
        base = stable_seconds.mean
        yield "the ratio of seconds per token", judged.token_seconds.mean / base if base > 0 else math.nan, bounds.max_latency_ratio


def _get_errors(judged: Pooled) -> LossCounts:
    return LossCounts.from_mapping({0: judged.num_requests - judged.num_errors, 1000: judged.num_errors}, 0, 1)


def _get_stable_seconds(evidence: Evidence, baseline: Baseline) -> Moments:
    """Return the sums of the policy in force since the roll-out began; all that there is where a restart lost the beginning."""
    found, before = evidence.get_side(STABLE).token_seconds, Moments(*baseline.stable_token_seconds)
    since = found - before
    return since if since.count >= 0 and not since.find_problem() else found


def _say(name: str) -> str:
    return name.replace("_", " ")
