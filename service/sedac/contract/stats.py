"""Counters of what was computed and skipped, as plain numbers; filled by a worker, carried by the agent, shown by `ctl`."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

from sedac.contract.evidence import Moments

CONTROLLER_STATES = ("measuring", "trying", "drafting", "paused")
_TIER_TOTALS = ("num_tokens", "num_exited", "num_mlp_blocks_computed")
_DRAFT_TOTALS = ("num_drafted", "num_accepted", "num_verified_steps", "num_passes", "draft_seconds", "step_seconds")
_DRAFT_RATIOS = ("acceptance_rate", "token_ratio", "tokens_per_step", "mean_length", "draft_share")
_DRAFT_COUNTS = ("lengths", "accepted_at")
_TOTALS = ("num_steps", "num_torn_steps", "num_tokens", "num_decode_tokens", "num_mlp_blocks_computed", "num_mlp_blocks_skipped", "num_adaptations")


@dataclass(frozen=True, kw_only=True)
class CheckpointStats:
    """Totals of one checkpoint since the worker started, and its state."""

    layer: int
    num_evaluated: int
    """Tokens whose risk was computed."""
    num_exited: int
    """Tokens that exited here."""
    threshold: float = 0.0
    """Threshold in force now, adapted or not."""
    exit_rate: float = 0.0
    """Moving average of exits over evaluated tokens."""


@dataclass(frozen=True, kw_only=True)
class TierStats:
    """Totals of one tier since the worker started; a tier's counters live on while no policy lists it."""

    name: str
    num_tokens: int
    num_exited: int
    num_mlp_blocks_computed: float
    """MLPs computed, in full MLPs of single tokens. All of them would be num_tokens times the number of layers."""


@dataclass(frozen=True, kw_only=True)
class RankStats:
    """What one data-parallel rank runs."""

    rank: int
    active_revision: int
    num_steps: int


@dataclass(frozen=True, kw_only=True)
class ControllerStats:
    """What is known of drafting for one size of batch."""

    num_sequences: int
    """Largest number of sequences of this size. The smallest is just over half of it."""
    state: str
    """One of CONTROLLER_STATES. While `measuring`, steps run without drafts."""
    gain: float
    """Ratio of the rate of tokens with drafting to the rate without. 0 means unknown."""
    plain_seconds: float
    """Seconds of a step without drafts."""
    step_seconds: float
    """Seconds of a step that verified drafts, without the time of drafting."""
    draft_pass_seconds: float
    tokens_per_step: float
    """Output tokens of a sequence in a step that verified drafts."""


@dataclass(frozen=True, kw_only=True)
class DraftingStats:
    """Totals of self-speculation since the worker started, and its state now."""

    kind: str
    """Kind of the draft: adapter, exit-head or reduced."""
    num_drafted: int = 0
    """Draft tokens that were verified."""
    num_accepted: int = 0
    num_verified_steps: int = 0
    """Steps in which a sequence had drafts verified, summed over the sequences."""
    lengths: tuple[int, ...] = ()
    """Steps of single sequences by number of draft tokens: 0, 1, 2, ..."""
    accepted_at: tuple[int, ...] = ()
    """Draft tokens accepted, by position."""
    num_passes: int = 0
    draft_seconds: float = 0.0
    """Seconds spent drafting."""
    step_seconds: float = 0.0
    """Seconds of all steps, drafting included."""
    controller: tuple[ControllerStats, ...] = ()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DraftingStats:
        """Build from `dataclasses.asdict`'s form."""
        parts = {name: tuple(data.get(name, ())) for name in _DRAFT_COUNTS}
        return cls(**{**data, **parts, "controller": tuple(ControllerStats(**c) for c in data.get("controller", ()))})

    @property
    def acceptance_rate(self) -> float:
        """AR; NaN before the first draft token."""
        return _divide(self.num_accepted, self.num_drafted)

    @property
    def token_ratio(self) -> float:
        """TRR, of all output tokens of the engine; NaN before the first."""
        return _divide(self.num_accepted, sum(self.lengths) + self.num_accepted)

    @property
    def tokens_per_step(self) -> float:
        """Output tokens of a sequence in a step, with drafts verified or without; NaN before the first."""
        return _divide(sum(self.lengths) + self.num_accepted, sum(self.lengths))

    @property
    def mean_length(self) -> float:
        """Draft tokens of a sequence in a step that verified some; NaN before the first."""
        return _divide(self.num_drafted, self.num_verified_steps)

    @property
    def draft_share(self) -> float:
        """Share of the time of steps that was spent drafting; NaN before the first."""
        return _divide(self.draft_seconds, self.step_seconds)

    @property
    def drafted_at(self) -> tuple[int, ...]:
        """Draft tokens that were verified, by position."""
        return tuple(sum(self.lengths[position:]) for position in range(1, len(self.lengths)))

    def get_rates(self) -> dict[str, float | None]:
        """Return the ratios above; None where there is none yet."""
        ratios = {name: getattr(self, name) for name in _DRAFT_RATIOS}
        return {name: None if math.isnan(ratio) else ratio for name, ratio in ratios.items()}

    def since(self, before: DraftingStats | None) -> DraftingStats:
        """Return what came since `before`, with the state now; everything where totals have begun anew in between."""
        if before is None or any(now < old for now, old in zip(self._get_totals(), before._get_totals(), strict=True)):
            return self
        return self._combine(before, lambda now, old: now - old)

    def plus(self, other: DraftingStats) -> DraftingStats:
        """Return the totals of two ranks; of a size of batch that both know this one's state."""
        known = {c.num_sequences for c in self.controller}
        controller = [*self.controller, *(c for c in other.controller if c.num_sequences not in known)]
        summed = self._combine(other, lambda one, two: one + two)
        return replace(summed, controller=tuple(sorted(controller, key=lambda c: c.num_sequences)))

    def _get_totals(self) -> tuple[float, ...]:
        return tuple(getattr(self, name) for name in _DRAFT_TOTALS)

    def _combine(self, other: DraftingStats, operate: Callable[[Any, Any], Any]) -> DraftingStats:
        found: dict[str, Any] = {name: operate(getattr(self, name), getattr(other, name)) for name in _DRAFT_TOTALS}
        for name in _DRAFT_COUNTS:
            found[name] = tuple(operate(one, two) for one, two in zip_longest(getattr(self, name), getattr(other, name), fillvalue=0))
        return replace(self, **found)


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Totals of one worker since it started, or of several ranks together."""

    active_revision: int = 0
    active_rollout: int = 0
    """Number of the roll-out whose candidate is in force beside the policy. 0 means none."""
    num_steps: int = 0
    """Forward passes with at least one request."""
    num_torn_steps: int = 0
    """Forward passes that saw two revisions. Anything but 0 is a bug."""
    num_tokens: int = 0
    num_decode_tokens: int = 0
    """Tokens that were allowed to exit."""
    num_mlp_blocks_computed: float = 0
    """Computed MLPs of single tokens, a reduced one counted by its share."""
    num_mlp_blocks_skipped: float = 0
    checkpoints: tuple[CheckpointStats, ...] = field(default=())
    tiers: tuple[TierStats, ...] = field(default=())
    num_adaptations: int = 0
    """Changes of thresholds by adaptation since it was last reset."""
    ranks: tuple[RankStats, ...] = field(default=())
    """Entries of the data-parallel ranks. Empty where there is only one."""
    drafting: DraftingStats | None = None
    """Totals of drafting. None where the engine has no draft of its own."""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Stats:
        """Build from `dataclasses.asdict`'s form."""
        parts: dict[str, type] = {"checkpoints": CheckpointStats, "tiers": TierStats, "ranks": RankStats}
        made: dict[str, Any] = {name: tuple(kind(**entry) for entry in data.get(name, ())) for name, kind in parts.items()}
        drafting = data.get("drafting")
        return cls(**{**data, **made, "drafting": DraftingStats.from_dict(drafting) if drafting else None})


@dataclass(kw_only=True)
class Evidence:
    """What was measured of one tier's requests on one side, since the side's policy came into force; grows as requests finish."""

    side: str
    """Either stable or candidate."""
    tier: str
    revision: int = 0
    """On the stable side, the revision of its policy."""
    rollout: int = 0
    """On the candidate side, the number of its roll-out."""
    num_requests: int = 0
    """Finished requests. Each choice of a request with several counts."""
    num_errors: int = 0
    """Those of the finished requests that an error of the engine ended."""
    first_token_seconds: Moments = field(default_factory=Moments)
    """Seconds from arrival to the first token."""
    token_seconds: Moments = field(default_factory=Moments)
    """Seconds per output token after the first, one mean per request."""
    num_audited_tokens: int = 0
    num_audit_failures: int = 0
    """Audits that gave no result."""
    mismatch_counts: Counter[int] = field(default_factory=Counter)
    """Answers of greedy requests by their share of tokens that the full model would not choose, in thousandths rounded down."""
    nll_difference_counts: Counter[int] = field(default_factory=Counter)
    """Answers by what their tokens lost in log-probability on average, in thousandths of a nat rounded down and cut to -1000..1000."""


def add_up(parts: Sequence[Stats]) -> Stats:
    """Return the totals of data-parallel ranks, at least one; what is no total, such as thresholds, is the first rank's."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    checkpoints = []
    for same in zip(*(part.checkpoints for part in parts), strict=True):
        evaluated = sum(c.num_evaluated for c in same)
        rate = sum(c.exit_rate * c.num_evaluated for c in same) / evaluated if evaluated else 0.0
        checkpoints.append(replace(same[0], num_evaluated=evaluated, num_exited=sum(c.num_exited for c in same), exit_rate=rate))
    tiers: dict[str, TierStats] = {}
    for tier in (tier for part in parts for tier in part.tiers):
        known = tiers.get(tier.name)
        sums = {name: getattr(tier, name) + getattr(known, name) for name in _TIER_TOTALS} if known else {}
        tiers[tier.name] = replace(tier, **sums)
    drafting = [part.drafting for part in parts if part.drafting]
    return replace(
        first,
        **{name: sum(getattr(part, name) for part in parts) for name in _TOTALS},
        checkpoints=tuple(checkpoints),
        tiers=tuple(tiers.values()),
        ranks=tuple(RankStats(rank=i, active_revision=p.active_revision, num_steps=p.num_steps) for i, p in enumerate(parts)),
        drafting=functools.reduce(DraftingStats.plus, drafting) if drafting else None,
    )


def _divide(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
