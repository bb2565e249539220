"""The totals of a worker since it started: steps, tokens, and by tier what was saved; plain numbers on the host.

T tokens of the step.
"""

from __future__ import annotations

import numpy as np

from sedac.contract.stats import TierStats
from sedac.engine.backends.base import Left
from sedac.engine.backends.tokens import Array, Tokens
from sedac.policy.model import EXACT


class Counters:
    """Counts; see the module's docstring."""

    def __init__(self) -> None:
        self.num_steps = self.num_tokens = self.num_decode_tokens = 0
        self.num_torn_steps = 0
        """Number of steps in which the policy changed."""
        self.num_saved = 0.0
        """MLPs saved, in full MLPs of a token."""
        self._tier_rows: dict[str, int] = {}
        self._tier_totals: Array = np.zeros((0, 3))

    def get_tier_row(self, tier: str) -> int:
        """Return the row of a tier's counters, made when first asked for."""
        if tier not in self._tier_rows:
            self._tier_rows[tier] = len(self._tier_rows)
            self._tier_totals = np.vstack([self._tier_totals, np.zeros((1, 3))])
        return self._tier_rows[tier]

    def count_exact(self, num_tokens: int) -> None:
        """Count tokens of exact requests."""
        self._tier_totals[self.get_tier_row(EXACT), 0] += num_tokens

    def count_tokens(self, tokens: Tokens, left: Left | None, num_steps: int = 1) -> None:
        """Count the tokens of a pass, or of so many over the same ones, to their tiers, and what was left; None: nothing was reduced."""
        size, counts = len(self._tier_totals), tokens.tier_counts
        self._tier_totals[: len(counts), 0] += counts * num_steps
        if left is not None:
            self.num_saved += float(left.saved_T.sum())
            self._tier_totals[:, 1] += np.bincount(tokens.tier_T, weights=left.done_T, minlength=size)
            self._tier_totals[:, 2] += np.bincount(tokens.tier_T, weights=left.saved_T, minlength=size)

    def get_tiers(self, num_layers: int) -> tuple[TierStats, ...]:
        """Return the totals of each tier in a model of so many layers."""
        return tuple(
            TierStats(name=name, num_tokens=int(tokens), num_exited=int(exited), num_mlp_blocks_computed=float(tokens * num_layers - saved))
            for name, (tokens, exited, saved) in zip(self._tier_rows, self._tier_totals.tolist(), strict=True)
        )
