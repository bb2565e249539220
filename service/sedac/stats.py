"""Counters of what was computed and skipped, as plain numbers; filled by a worker, carried by the agent, shown by `ctl`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class CheckpointStats:
    """Totals of one checkpoint since the worker started, and its state."""

    layer: int
    num_evaluated: int
    """tokens whose risk was computed"""
    num_exited: int
    """tokens that exited here"""
    threshold: float = 0.0
    """in force now, adapted or not"""
    exit_rate: float = 0.0
    """moving average of exits over evaluated tokens"""


@dataclass(frozen=True, kw_only=True)
class TierStats:
    """Totals of one tier since the worker started; a tier's counters live on while no policy lists it."""

    name: str
    num_tokens: int
    num_exited: int
    num_mlp_blocks_computed: float
    """in full MLPs of single tokens; num_tokens times the number of layers is everything"""


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Totals of one worker since it started."""

    active_revision: int = 0
    num_steps: int = 0
    """forward passes with at least one request"""
    num_torn_steps: int = 0
    """forward passes that saw two revisions; anything but 0 is a bug"""
    num_tokens: int = 0
    num_decode_tokens: int = 0
    """tokens that were allowed to exit"""
    num_mlp_blocks_computed: float = 0
    """MLPs of single tokens, a reduced one counted by its share"""
    num_mlp_blocks_skipped: float = 0
    checkpoints: tuple[CheckpointStats, ...] = field(default=())
    tiers: tuple[TierStats, ...] = field(default=())
    num_adaptations: int = 0
    """changes of thresholds by adaptation since it was last reset"""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Stats:
        """Build from `dataclasses.asdict`'s form."""
        parts = {"checkpoints": CheckpointStats, "tiers": TierStats}
        return cls(**{**data, **{name: tuple(kind(**entry) for entry in data.get(name, ())) for name, kind in parts.items()}})
