"""Evidence of many engines as one: what each engine last reported, kept over its restarts, checked, and added up by side and tier.

The fleet takes reports into the book on the event loop; pooling is a pure function, for a worker thread. Broken evidence is left out
of the sums and said of, so that whoever decides on the sums can refuse to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field

from sedac.contract.evidence import LossCounts, Moments
from sedac.contract.v1 import evidence_pb2
from sedac.policy.model import EXACT, Policy

Reported = tuple[str, evidence_pb2.Evidence]
"""An engine's id and one piece of what it reported."""
Key = tuple[evidence_pb2.Side, str]
"""Which of the two policies, and a tier."""
STABLE, CANDIDATE = evidence_pb2.SIDE_STABLE, evidence_pb2.SIDE_CANDIDATE


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """Evidence of one tier on one side, of all engines."""

    num_requests: int = 0
    num_errors: int = 0
    num_audit_failures: int = 0
    first_token_seconds: Moments = field(default_factory=Moments)
    token_seconds: Moments = field(default_factory=Moments)
    mismatch: LossCounts = field(default_factory=LossCounts)
    nll_difference: LossCounts = field(default_factory=LossCounts)

    def __add__(self, other: Pooled) -> Pooled:
        """Return both together."""
        return Pooled(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)})


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that is known at one moment."""

    tiers: dict[Key, Pooled]
    problems: tuple[str, ...] = ()
    """What was left out, and why."""

    def get_side(self, side: evidence_pb2.Side) -> Pooled:
        """Return a side's tiers together."""
        return sum((pooled for (found, _), pooled in self.tiers.items() if found == side), Pooled())


class EvidenceBook:
    """What every engine last reported of the policies now in force; counts that an engine lost by a restart are kept."""

    def __init__(self) -> None:
        self._revision = self._rollout = 0
        self._tiers: dict[evidence_pb2.Side, set[str]] = {}
        self._now: dict[str, dict[Key, evidence_pb2.Evidence]] = {}
        self._before: list[Reported] = []

    def expect(self, revision: int, policy: Policy | None, rollout: int, candidate: Policy | None) -> None:
        """Set what is in force; evidence of anything else is dropped, now and later."""
        kept = {side for side, same in ((STABLE, revision == self._revision), (CANDIDATE, rollout == self._rollout)) if same}
        self._revision, self._rollout = revision, rollout
        self._tiers = {side: _get_tiers(found) for side, found in ((STABLE, policy), (CANDIDATE, candidate))}
        for engine_id, found in self._now.items():
            self._now[engine_id] = {key: evidence for key, evidence in found.items() if key[0] in kept}
        self._before = [(engine_id, evidence) for engine_id, evidence in self._before if _get_side(evidence) in kept]

    def take(self, engine_id: str, reported: Iterable[evidence_pb2.Evidence]) -> bool:
        """Note what an engine reported; returns whether that is anything new."""
        before = self._now.get(engine_id, {})
        now: dict[Key, evidence_pb2.Evidence] = {}
        for evidence in reported:
            side = _get_side(evidence)
            in_force = evidence.revision == self._revision if side == STABLE else evidence.rollout == self._rollout
            if in_force and evidence.tier in self._tiers.get(side, ()):
                now[side, evidence.tier] = evidence
        for key, last in before.items():
            if key not in now:
                now[key] = last
            elif now[key].num_requests < last.num_requests:  # the engine started anew
                self._before.append((engine_id, last))
        self._now[engine_id] = now
        return now != before

    def list(self) -> list[Reported]:
        """Return all pieces of evidence, those from before restarts too."""
        return [*self._before, *((engine_id, evidence) for engine_id, found in self._now.items() for evidence in found.values())]


def pool(reported: Iterable[Reported]) -> Evidence:
    """Check evidence and add it up."""
    tiers: dict[Key, Pooled] = {}
    problems: list[str] = []
    for engine_id, evidence in reported:
        key = (_get_side(evidence), evidence.tier)
        try:
            tiers[key] = tiers.get(key, Pooled()) + _read(evidence)
        except ValueError as error:
            problems.append(f"engine {engine_id}, tier {evidence.tier}: {error}")
    return Evidence(tiers=tiers, problems=tuple(problems))


def _read(evidence: evidence_pb2.Evidence) -> Pooled:
    for name in ("num_requests", "num_errors", "num_audited_tokens", "num_audit_failures"):
        if getattr(evidence, name) < 0:
            raise ValueError(f"{name} is {getattr(evidence, name)}; a count is not negative")
    if evidence.num_errors > evidence.num_requests:
        raise ValueError(f"num_errors {evidence.num_errors} is more than num_requests {evidence.num_requests}")
    return Pooled(
        num_requests=evidence.num_requests,
        num_errors=evidence.num_errors,
        num_audit_failures=evidence.num_audit_failures,
        first_token_seconds=_read_moments(evidence, "first_token_seconds"),
        token_seconds=_read_moments(evidence, "token_seconds"),
        mismatch=LossCounts.from_mapping(evidence.mismatch_counts, 0, 1),
        nll_difference=LossCounts.from_mapping(evidence.nll_difference_counts, -1, 1),
    )


def _read_moments(evidence: evidence_pb2.Evidence, name: str) -> Moments:
    message = getattr(evidence, name)
    moments = Moments(message.count, message.sum, message.sum_squares)
    if problem := moments.find_problem():
        raise ValueError(f"{name}: {problem}")
    return moments


def _get_side(evidence: evidence_pb2.Evidence) -> evidence_pb2.Side:
    return CANDIDATE if evidence.side == CANDIDATE else STABLE


def _get_tiers(policy: Policy | None) -> set[str]:
    return {EXACT, *(tier.name for tier in policy.get_tiers())} if policy else set()
