"""What was measured of the requests that finished under the policies in force: one book per side, one page per tier.

A book is opened when its side's policy comes into force and dropped when another does, so that no figure mixes two policies. Requests
keep the page that was open when they arrived.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from sedac.agent.scoring import Loss
from sedac.contract.evidence import Limits, LossCounts, Moments, get_limits
from sedac.contract.stats import Evidence
from sedac.policy.model import CANDIDATE, EXACT, STABLE, Policy

_UNIT = 1000


class Page(Evidence):
    """Counts of one tier on one side, as requests and audits finish."""

    def add_finished(self, *, is_error: bool, first_token_seconds: float | None, token_seconds: float | None) -> None:
        """Count a finished choice; None: not measured."""
        self.num_requests += 1
        self.num_errors += is_error
        if first_token_seconds is not None:
            self.first_token_seconds += Moments(1, first_token_seconds, first_token_seconds**2)
        if token_seconds is not None:
            self.token_seconds += Moments(1, token_seconds, token_seconds**2)

    def add_loss(self, loss: Loss) -> None:
        """Count an audited answer."""
        self.num_audited_tokens += loss.num_tokens
        if loss.num_mismatches is not None:
            self.mismatch_counts[loss.num_mismatches * _UNIT // loss.num_tokens] += 1
        self.nll_difference_counts[math.floor(max(-1.0, min(1.0, loss.nll_difference)) * _UNIT)] += 1

    def get_limits(self, confidence: float) -> dict[str, Limits]:
        """Return limits at `confidence` of the means of both losses; both are NaN means before the first audited answer."""
        return {
            "mismatch": get_limits(LossCounts.from_mapping(self.mismatch_counts, 0, 1), confidence),
            "nll_difference": get_limits(LossCounts.from_mapping(self.nll_difference_counts, -1, 1), confidence, -1, 1),
        }

    def to_dict(self, confidence: float) -> dict[str, Any]:
        """Return plain JSON types for people, with limits at `confidence`; None: nothing was counted."""
        names = ("side", "revision", "rollout", "tier", "num_requests", "num_errors", "num_audited_tokens", "num_audit_failures")
        means = {"mean_first_token_seconds": self.first_token_seconds.mean, "mean_token_seconds": self.token_seconds.mean}
        return {
            **{name: getattr(self, name) for name in names},
            "num_audited": self.nll_difference_counts.total(),
            **{name: None if math.isnan(mean) else mean for name, mean in means.items()},
            **{name: None if math.isnan(found.mean) else vars(found) for name, found in self.get_limits(confidence).items()},
        }


@dataclass(kw_only=True)
class Book:
    """The pages of one side since its policy came into force."""

    side: str
    policy: Policy
    revision: int = 0
    """On the stable side, the revision of the policy."""
    rollout: int = 0
    """On the candidate side, the number of the roll-out."""
    pages: dict[str, Page] = field(default_factory=dict)

    def get_page(self, tier: str) -> Page:
        """Return a tier's page, opened when first asked for."""
        if tier not in self.pages:
            self.pages[tier] = Page(tier=tier, side=self.side, revision=self.revision, rollout=self.rollout)
        return self.pages[tier]

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return every page for people."""
        return [page.to_dict(self.policy.audit.confidence) for page in self.pages.values()]


def open_book(before: Book | None, policy: Policy, *, revision: int = 0, rollout: int = 0) -> Book:
    """Return the book for a policy that comes into force: the one `before` where it is the same again, such as after a reconnect."""
    if before and (before.policy, before.revision, before.rollout) == (policy, revision, rollout):
        return before
    book = Book(side=CANDIDATE if rollout else STABLE, policy=policy, revision=revision, rollout=rollout)
    for tier in (EXACT, *(t.name for t in policy.get_tiers())):
        book.get_page(tier)
    return book
