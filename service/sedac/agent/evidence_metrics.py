"""Evidence on the engine's own /metrics: audits, what they found, and how fast the sides are; with the labels of metrics.py.

Label sets are closed and pre-created: sides are `stable` and `candidate`, tiers those of the policies seen, and `_other` from the 33rd on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from prometheus_client import Counter, Gauge, Histogram

from sedac.agent.evidence import Book, Page
from sedac.agent.scoring import FAILURES, Failure, Loss
from sedac.contract.evidence import Limits
from sedac.policy.model import CANDIDATE, EXACT, STABLE

_LABELS = ["model_name", "engine"]
_SIDES = (STABLE, CANDIDATE)
_MAX_TIERS, _OTHER = 32, "_other"
_FIRST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_EACH_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.4, 1.0)

_AUDITED = Counter("sedac_audited_answers", "Bounded answers that were scored again in full.", [*_LABELS, "tier", "side"])
_FAILURES = Counter(
    "sedac_audit_failures", "Audits without a result: pushed out of the queue by newer ones (dropped), or not scored (failed).", [*_LABELS, "reason"]
)
_MISMATCH = Gauge(
    "sedac_audit_mismatch",
    "Share of greedy tokens that the full model would not choose, since the side's policy came into force: mean over answers, and limits of it.",
    [*_LABELS, "tier", "side", "limit"],
)
_NLL_DIFFERENCE = Gauge(
    "sedac_audit_nll_difference",
    "What tokens lost in log-probability (nats) since the side's policy came into force: mean over answers, and limits of it.",
    [*_LABELS, "tier", "side", "limit"],
)
_ROLLOUT = Gauge("sedac_rollout", "Number of the roll-out whose candidate is in force beside the policy; 0: none.", _LABELS)
_FIRST_SECONDS = Histogram("sedac_request_first_token_seconds", "Time from arrival to the first token.", [*_LABELS, "side"], buckets=_FIRST_BUCKETS)
_EACH_SECONDS = Histogram(
    "sedac_request_token_seconds", "Time per output token after the first, a mean per request.", [*_LABELS, "side"], buckets=_EACH_BUCKETS
)


class EvidenceMetrics:
    """Shows the books of one engine."""

    def __init__(self, *, model_name: str, engine: str = "0") -> None:
        self._labels = (model_name, engine)
        self._tiers: set[str] = set()
        self._books: list[Book] = []
        for reason in FAILURES:
            _FAILURES.labels(*self._labels, reason)
        for side in _SIDES:
            _FIRST_SECONDS.labels(*self._labels, side)
            _EACH_SECONDS.labels(*self._labels, side)
        _ROLLOUT.labels(*self._labels)
        self._add_tier(EXACT)

    def set_books(self, books: Sequence[Book]) -> None:
        """Show from now on what these books hold; what others held is forgotten."""
        self._books = list(books)
        _ROLLOUT.labels(*self._labels).set(max((book.rollout for book in books), default=0))
        for book in books:
            for tier in book.policy.get_tiers():
                self._add_tier(tier.name)
        for name in self._tiers:
            for side in _SIDES:
                self._clear(name, side)
        self.show()

    def add_latency(self, page: Page, first: float | None, each: float | None) -> None:
        """Count one finished request: seconds to the first token and per token after it; None: not measured."""
        if first is not None:
            _FIRST_SECONDS.labels(*self._labels, page.side).observe(first)
        if each is not None:
            _EACH_SECONDS.labels(*self._labels, page.side).observe(each)

    def add_result(self, page: Page, result: Loss | Failure) -> None:
        """Count one audit."""
        if isinstance(result, str):
            _FAILURES.labels(*self._labels, result).inc()
        else:
            _AUDITED.labels(*self._labels, page.tier if page.tier in self._tiers else _OTHER, page.side).inc()

    def show(self) -> None:
        """Show what the audits found so far under the policies in force."""
        for book in self._books:
            for page in book.pages.values():
                if page.tier in self._tiers and page.nll_difference_counts:
                    limits = page.get_limits(book.policy.audit.confidence)
                    self._set(_MISMATCH, page, limits["mismatch"])
                    self._set(_NLL_DIFFERENCE, page, limits["nll_difference"])

    def _set(self, gauge: Gauge, page: Page, limits: Limits) -> None:
        for name in ("lower", "mean", "upper"):
            value = math.nan if math.isnan(limits.mean) else getattr(limits, name)
            gauge.labels(*self._labels, page.tier, page.side, name).set(value)

    def _add_tier(self, name: str) -> None:
        if name not in self._tiers and len(self._tiers) < _MAX_TIERS:
            self._tiers.add(name)
            for side in _SIDES:
                _AUDITED.labels(*self._labels, name, side)
                self._clear(name, side)

    def _clear(self, tier: str, side: str) -> None:
        for gauge in (_MISMATCH, _NLL_DIFFERENCE):
            for name in ("lower", "mean", "upper"):
                gauge.labels(*self._labels, tier, side, name).set(math.nan)
