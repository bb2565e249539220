"""One roll-out: its terms, its state, and what each change of state needs.

    start -> progressing -> progressing (next share) -> ... -> promoted
                  |  ^                                            ^
                  v  |--- resume                                  |--- by an operator, from either state
                paused ------------------------------------> aborted

Whoever decides on a change is elsewhere: operators (servicer.py), the analysis (driver.py), a new revision of the policy (changes.py).
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
from dataclasses import dataclass, field
from typing import Literal

from sedac.contract import wire
from sedac.contract.v1 import rollouts_pb2
from sedac.control.rollout.bounds import Baseline, Bounds
from sedac.errors import RolloutConflict, StaleEtag
from sedac.policy.model import Candidate, Policy

State = Literal["progressing", "paused", "promoted", "aborted"]
STATES: dict[State, rollouts_pb2.RolloutState] = {
    "progressing": rollouts_pb2.ROLLOUT_STATE_PROGRESSING,
    "paused": rollouts_pb2.ROLLOUT_STATE_PAUSED,
    "promoted": rollouts_pb2.ROLLOUT_STATE_PROMOTED,
    "aborted": rollouts_pb2.ROLLOUT_STATE_ABORTED,
}
_UNDER_WAY = ("progressing", "paused")


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One roll-out."""

    number: int
    policy: Policy
    base_revision: int
    shares: tuple[float, ...]
    interval_seconds: float
    min_requests: int
    bounds: Bounds
    author: str
    comment: str
    state: State = "progressing"
    step: int = 0
    attempt: int = 0
    """Grows when the roll-out is resumed, so that engines that refused it are asked again."""
    reason: str = ""
    promoted_revision: int = 0
    engines: tuple[str, ...] = ()
    """The engines that must be heard of in the analysis."""
    baseline: Baseline = field(default_factory=Baseline)
    created: float = 0.0
    """When it was started, in seconds since the epoch."""
    updated: float = 0.0
    version: int = 0
    evidence: bytes = b""
    """What both policies had shown at the last analysis, as a serialized message `Rollout` that holds nothing else."""

    @property
    def name(self) -> str:
        """Its name in the contract."""
        return f"rollouts/{self.number}"

    @property
    def etag(self) -> str:
        """Changes with every version."""
        return hashlib.sha256(f"{self.number}:{self.version}".encode()).hexdigest()[:16]

    @property
    def share(self) -> float:
        """Share of the requests in its step; 0 once it is over."""
        return self.shares[self.step] if self.is_under_way else 0.0

    @property
    def is_under_way(self) -> bool:
        """Whether the candidate serves requests as a candidate."""
        return self.state in _UNDER_WAY

    @property
    def limit_confidence(self) -> float:
        """Confidence of each limit that is held against its bounds, of each tier and of all tiers together."""
        return self.bounds.get_limit_confidence(self.policy, together=True)

    @property
    def candidate(self) -> Candidate | None:
        """What engines are pushed; None once it is over."""
        if not self.is_under_way:
            return None
        return Candidate(rollout=self.number, policy=self.policy, share=self.share)

    def to_proto(self) -> rollouts_pb2.Rollout:
        """Write it as the contract shows it."""
        message = rollouts_pb2.Rollout.FromString(self.evidence)
        for name in ("name", "number", "base_revision", "step", "interval_seconds", "min_requests", "reason", "author", "comment", "etag"):
            setattr(message, name, getattr(self, name))
        message.state, message.promoted_revision = STATES[self.state], self.promoted_revision
        message.policy.CopyFrom(wire.policy_to_proto(self.policy))
        message.shares.extend(self.shares)
        message.bounds.CopyFrom(rollouts_pb2.RolloutBounds(**vars(self.bounds)))
        message.create_time.FromDatetime(datetime.datetime.fromtimestamp(self.created, datetime.UTC))
        message.update_time.FromDatetime(datetime.datetime.fromtimestamp(self.updated, datetime.UTC))
        return message

    def end(self, state: Literal["promoted", "aborted"], reason: str, *, promoted_revision: int = 0) -> Rollout:
        """Return it over.

        Raises:
            RolloutConflict: it is over already.
        """
        self._check("under way", self.is_under_way)
        return dataclasses.replace(self, state=state, reason=reason, promoted_revision=promoted_revision)

    def pause(self, reason: str) -> Rollout:
        """Return it paused.

        Raises:
            RolloutConflict: it is not progressing.
        """
        self._check("progressing", self.state == "progressing")
        return dataclasses.replace(self, state="paused", reason=reason)

    def resume(self, reason: str, engines: tuple[str, ...]) -> Rollout:
        """Return it progressing again, from the same share.

        Raises:
            RolloutConflict: it is not paused.
        """
        self._check("paused", self.state == "paused")
        return dataclasses.replace(self, state="progressing", reason=reason, attempt=self.attempt + 1, engines=engines)

    def advance(self, reason: str, engines: tuple[str, ...], baseline: Baseline) -> Rollout:
        """Return it at its next share, which must exist."""
        assert self.state == "progressing"
        assert self.step + 1 < len(self.shares)
        return dataclasses.replace(self, step=self.step + 1, reason=reason, engines=engines, baseline=baseline)

    def check_etag(self, etag: str) -> None:
        """Check a guard that came with a change; empty: none.

        Raises:
            StaleEtag: it changed since it was read.
        """
        if etag and etag != self.etag:
            raise StaleEtag(f"etag {etag[:40]!r} is not {self.name}'s ({self.etag!r}, {self.state}); read it again and retry")

    def _check(self, wanted: str, found: bool) -> None:
        if not found:
            raise RolloutConflict(f"{self.name} is {self.state}, not {wanted}" + (f": {self.reason}" if self.reason else ""))
