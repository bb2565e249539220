"""What evidence says of a roll-out's candidate: a breach, a pass, or no verdict and why. Pure functions.

A breach needs a limit that holds at every look to be over its bound; a pass needs enough of every number that is asked for, all of it
sound, from every engine, and every mean within its bound. Whatever is in between is no verdict, so that nothing is promoted for lack of
evidence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from sedac.contract.evidence import LossCounts, Moments, exceeds, get_limits, get_ratio_limit
from sedac.contract.v1 import evidence_pb2
from sedac.control.fleet.pooling import CANARY, STABLE, Evidence, Pooled
from sedac.control.rollout.store import Baseline, Bounds
from sedac.policy.model import Policy

_MAX_SHOWN = 3


@dataclass(frozen=True)
class Verdict:
    """What to do with a candidate, and why."""

    kind: Literal["breach", "none", "pass"]
    reason: str


def analyse(evidence: Evidence, *, policy: Policy, bounds: Bounds, min_requests: int, baseline: Baseline, unheard: Sequence[str] = ()) -> Verdict:
    """Return the verdict on the candidate `policy`; `unheard` says which engines are missing from the evidence, and why."""
    canary = evidence.get_arm(CANARY)
    stable_seconds = _get_stable_seconds(evidence, baseline)
    if breach := _find_breach(evidence, policy, bounds, stable_seconds):
        return Verdict("breach", breach)
    troubles = [*unheard, *evidence.problems]
    if troubles:
        more = f" and {len(troubles) - _MAX_SHOWN} more" if len(troubles) > _MAX_SHOWN else ""
        return Verdict("none", "; ".join(troubles[:_MAX_SHOWN]) + more)
    if missing := _find_missing(canary, stable_seconds, bounds, min_requests, baseline):
        return Verdict("none", missing)
    if over := _find_doubt(canary, stable_seconds, bounds):
        return Verdict("none", over)
    return Verdict("pass", _describe(canary, stable_seconds, bounds))


def get_confidence(confidence: float, num_tests: int) -> float:
    """Return the confidence of each of several tests under which all of them hold together."""
    return 1 - (1 - confidence) / max(1, num_tests)


def to_tier_evidence(evidence: Evidence, stable_confidence: float, canary_confidence: float) -> list[evidence_pb2.TierEvidence]:
    """Write evidence for people, by arm and tier, with limits that hold each at its arm's confidence."""
    shown = []
    for (arm, tier), pooled in sorted(evidence.tiers.items()):
        confidence = canary_confidence if arm == CANARY else stable_confidence
        shown.append(
            evidence_pb2.TierEvidence(
                arm=arm,
                tier=tier,
                num_requests=pooled.num_requests,
                num_errors=pooled.num_errors,
                mismatch=_estimate(pooled.mismatch, confidence, 0),
                nll_difference=_estimate(pooled.nll_difference, confidence, -1),
                mean_first_token_seconds=pooled.first_token_seconds.mean,
                mean_token_seconds=pooled.token_seconds.mean,
            )
        )
    return shown


def count_tests(bounds: Bounds, policy: Policy) -> int:
    """Return how many limits are held against bounds: of each loss one per tier, and one of all where there are several."""
    num_tiers = len(policy.get_tiers())
    num_audited = sum(bound is not None for bound in (bounds.max_mismatch, bounds.max_nll_difference))
    num_others = sum(bound is not None for bound in (bounds.max_latency_ratio, bounds.max_error_share))
    return num_audited * (num_tiers + (num_tiers > 1)) + num_others


def _estimate(counts: LossCounts, confidence: float, low: int) -> evidence_pb2.Estimate:
    limits = get_limits(counts, confidence, low, 1)
    return evidence_pb2.Estimate(num_requests=counts.num_requests, mean=limits.mean, lower=limits.lower, upper=limits.upper)


def _find_breach(evidence: Evidence, policy: Policy, bounds: Bounds, stable_seconds: Moments) -> str:
    canary = evidence.get_arm(CANARY)
    confidence = get_confidence(bounds.confidence, count_tests(bounds, policy))
    tiers = [(f"tier {tier}: ", pooled) for (arm, tier), pooled in sorted(evidence.tiers.items()) if arm == CANARY]
    for name, bound, low in _get_losses(bounds):
        for where, pooled in [*tiers, ("all tiers: ", canary)]:
            counts = getattr(pooled, name)
            if exceeds(counts, bound, confidence, low, 1):
                lower = get_limits(counts, confidence, low, 1).lower
                return f"{where}{_say(name)} is over {lower:.4g}, its bound is {bound:g} ({counts.num_requests} audited, mean {counts.mean:.4g})"
    if bounds.max_error_share is not None and exceeds(_get_errors(canary), bounds.max_error_share, confidence):
        return f"{canary.num_errors} of {canary.num_requests} requests ended in an error, at most {bounds.max_error_share:g} of them may"
    if bounds.max_latency_ratio is not None:
        ratio = get_ratio_limit(canary.token_seconds, stable_seconds, confidence)
        if ratio > bounds.max_latency_ratio:
            return f"seconds per token are over {ratio:.4g} times those of the policy in force, the bound is {bounds.max_latency_ratio:g}"
    return ""


def _find_missing(canary: Pooled, stable_seconds: Moments, bounds: Bounds, min_requests: int, baseline: Baseline) -> str:
    if canary.num_requests == 0:
        return "no evidence of the candidate: no request has finished under it"
    samples = [
        (name, getattr(canary, name).num_requests - getattr(baseline, f"num_{name}"), "audited answers") for name, _, _ in _get_losses(bounds)
    ] or [("requests", canary.num_requests - baseline.num_finished, "finished requests")]
    for name, found, of in samples:
        if found < min_requests:
            return f"too few {of} in this step for {_say(name)}: {max(0, found)}, {min_requests} are needed"
    if bounds.max_latency_ratio is not None:
        for whose, moments in (("candidate", canary.token_seconds), ("policy in force", stable_seconds)):
            if problem := moments.find_problem():
                return f"seconds per token of the {whose}: {problem}"
            if moments.count < max(2, min_requests):
                return f"too few requests of the {whose} with seconds per token: {moments.count}, {max(2, min_requests)} are needed"
            if moments.mean < 1e-12:
                return f"the seconds per token of the {whose} are all 0, so that there is no ratio"
    num_audited = canary.nll_difference.num_requests
    if canary.num_audit_failures > num_audited and list(_get_losses(bounds)):
        return f"{canary.num_audit_failures} audits gave no result, {num_audited} did; see the engines' logs"
    return ""


def _find_doubt(canary: Pooled, stable_seconds: Moments, bounds: Bounds) -> str:
    for name, mean, bound in _get_means(canary, stable_seconds, bounds):
        if not (math.isfinite(mean) and mean <= bound):  # NaN too
            return f"{name} is {mean:.4g} on average, its bound is {bound:g}; too close to tell: gather more, or decide"
    return ""


def _describe(canary: Pooled, stable_seconds: Moments, bounds: Bounds) -> str:
    found = [f"{name} {mean:.4g} (bound {bound:g})" for name, mean, bound in _get_means(canary, stable_seconds, bounds)]
    return ", ".join([f"{canary.num_requests} requests", f"{canary.nll_difference.num_requests} audited", *found])


def _get_means(canary: Pooled, stable_seconds: Moments, bounds: Bounds) -> Iterable[tuple[str, float, float]]:
    for name, bound, _ in _get_losses(bounds):
        yield _say(name), getattr(canary, name).mean, bound
    if bounds.max_error_share is not None:
        yield "the share of errors", _get_errors(canary).mean, bounds.max_error_share
    if bounds.max_latency_ratio is not None:
        base = stable_seconds.mean
        yield "the ratio of seconds per token", canary.token_seconds.mean / base if base > 0 else math.nan, bounds.max_latency_ratio


def _get_losses(bounds: Bounds) -> Iterable[tuple[str, float, int]]:
    """Return the audited losses that have a bound: field, bound and the least value there can be."""
    for name, bound, low in (("mismatch", bounds.max_mismatch, 0), ("nll_difference", bounds.max_nll_difference, -1)):
        if bound is not None:
            yield name, bound, low


def _get_errors(canary: Pooled) -> LossCounts:
    return LossCounts.from_mapping({0: canary.num_requests - canary.num_errors, 1000: canary.num_errors}, 0, 1)


def _get_stable_seconds(evidence: Evidence, baseline: Baseline) -> Moments:
    """Return the sums of the policy in force since the roll-out began; all that there is where a restart lost the beginning."""
    found, before = evidence.get_arm(STABLE).token_seconds, Moments(*baseline.stable_token_seconds)
    since = found - before
    return since if since.count >= 0 and not since.find_problem() else found


def _say(name: str) -> str:
    return name.replace("_", " ")
