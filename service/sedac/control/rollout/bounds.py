"""What evidence is held against: the bounds of a policy's audit or of a roll-out, and what had been counted before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from sedac.policy.model import Audit, Policy


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a policy must not pass; None: this is not asked for."""

    max_mismatch: float | None = None
    """Bound of the mean mismatch over its audited answers, 0 to 1."""
    max_nll_difference: float | None = None
    """Bound of the mean loss in log-probability over its audited answers, in nats per token, 0 to 1."""
    max_latency_ratio: float | None = None
    """Bound of its seconds per token over those of the policy in force, over 0."""
    max_error_share: float | None = None
    """Bound of the share of its finished requests that end in an error, 0 to 1."""
    confidence: float = 0.95
    """The probability that no bound is taken for passed that is not, however often one looks; 0.5 to below 1."""

    @classmethod
    def of_audit(cls, audit: Audit) -> Self:
        """Return what a policy in force is held against."""
        return cls(max_mismatch=audit.max_mismatch, max_nll_difference=audit.max_nll_difference, confidence=audit.confidence)

    def get_losses(self) -> list[tuple[str, float, int]]:
        """Return the audited losses that have a bound: the field of the evidence, the bound, and the least value that there can be."""
        losses = (("mismatch", self.max_mismatch, 0), ("nll_difference", self.max_nll_difference, -1))
        return [(name, bound, low) for name, bound, low in losses if bound is not None]

    def get_limit_confidence(self, policy: Policy, *, together: bool) -> float:
        """Return the confidence of each single limit under which all that are held against these bounds hold at once at `confidence`.

        There is a limit of each loss for each tier of `policy`, and, where `together` asks for it, one of all its tiers.
        """
        num_tiers = len(policy.get_tiers())
        num_others = sum(bound is not None for bound in (self.max_latency_ratio, self.max_error_share))
        num_limits = len(self.get_losses()) * (num_tiers + (together and num_tiers > 1)) + num_others
        return 1 - (1 - self.confidence) / max(1, num_limits)


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What had been counted before, so that what came since can be told."""

    num_finished: int = 0
    """How many requests of the candidate had finished when the step began."""
    num_mismatch: int = 0
    """How many of its answers had an audited mismatch when the step began."""
    num_nll_difference: int = 0
    """How many of its answers had an audited NLL difference when the step began."""
    stable_token_seconds: tuple[int, float, float] = (0, 0.0, 0.0)
    """The seconds per token of the policy in force when the roll-out began: count, sum, sum of squares."""
