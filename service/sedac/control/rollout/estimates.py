"""Evidence as people see it, in status and roll-outs: means with their limits, by side and tier."""

from __future__ import annotations

from sedac.contract.evidence import LossCounts, get_limits
from sedac.contract.v1 import evidence_pb2
from sedac.control.fleet.pooling import CANDIDATE, Evidence


def to_tier_evidence(evidence: Evidence, stable_confidence: float, candidate_confidence: float) -> list[evidence_pb2.TierEvidence]:
    """Write evidence for people, by side and tier, with limits that hold each at its side's confidence."""
    shown = []
    for (side, tier), pooled in sorted(evidence.tiers.items()):
        confidence = candidate_confidence if side == CANDIDATE else stable_confidence
        shown.append(
            evidence_pb2.TierEvidence(
                side=side,
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


def _estimate(counts: LossCounts, confidence: float, low: int) -> evidence_pb2.Estimate:
    limits = get_limits(counts, confidence, low, 1)
    return evidence_pb2.Estimate(num_requests=counts.num_requests, mean=limits.mean, lower=limits.lower, upper=limits.upper)
