"""Counters of what was computed and skipped, as plain numbers; filled by a worker, carried by the agent, shown by `ctl`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class CheckpointStats:
    """Totals of one checkpoint since the worker started."""

    layer: int
    num_evaluated: int
    """tokens whose risk was computed"""
    num_exited: int
    """tokens that exited here"""


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
    num_mlp_blocks_computed: int = 0
    """MLPs of single tokens"""
    num_mlp_blocks_skipped: int = 0
    checkpoints: tuple[CheckpointStats, ...] = field(default=())
