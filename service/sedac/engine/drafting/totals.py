"""Counters of drafting, as plain numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sedac.contract.stats import ControllerStats, DraftingStats


class Totals:
    """Counts since the worker started."""

    def __init__(self, max_tokens: int) -> None:
        self._lengths = np.zeros(max_tokens + 1, dtype=np.int64)
        self._accepted_at = np.zeros(max_tokens, dtype=np.int64)
        self._num_passes = 0
        self._draft_seconds, self._step_seconds = 0.0, 0.0

    def count_verified(self, generated: Sequence[tuple[int, int]]) -> None:
        """Count sequences that generated in a step: (draft tokens verified, accepted) of each."""
        for drafted, accepted in generated:
            self._lengths[drafted] += 1
            self._accepted_at[:accepted] += 1

    def count_undrafted(self, num_sequences: int) -> None:
        """Count sequences that generated in a step that verified nothing."""
        self._lengths[0] += num_sequences

    def count_drafting(self, num_passes: int, seconds: float) -> None:
        """Count a step's draft passes."""
        self._num_passes += num_passes
        self._draft_seconds += seconds

    def count_step(self, seconds: float) -> None:
        """Count the time of a step."""
        self._step_seconds += seconds

    def get_stats(self, kind: str, controller: tuple[ControllerStats, ...]) -> DraftingStats:
        """Return the totals."""
        lengths = self._lengths
        return DraftingStats(
            kind=kind,
            num_drafted=int((lengths * np.arange(len(lengths))).sum()),
            num_accepted=int(self._accepted_at.sum()),
            num_verified_steps=int(lengths[1:].sum()),
            lengths=tuple(lengths.tolist()),
            accepted_at=tuple(self._accepted_at.tolist()),
            num_passes=self._num_passes,
            draft_seconds=self._draft_seconds,
            step_seconds=self._step_seconds,
            controller=controller,
        )
