"""The sides of an engine: the stable policy, and while a roll-out is under way its candidate beside it.

Each side has all that decides about its tokens: policy, knobs, probes, adapted thresholds and the difficulty of prompts. The `State`
drives it between steps. Configuring a side writes into the buffers that the kernels read. C checkpoints, T tokens of
the step; a 2 is (evaluated, exited), a K one of a checkpoint's three knobs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sedac.engine.backends.sides import SideBuffers
from sedac.engine.step.adaptation import Adapter, Difficulty
from sedac.engine.step.probe_sets import Loaded
from sedac.policy.layout import Layout
from sedac.policy.model import CANDIDATE, STABLE, Policy

SIDES = (STABLE, CANDIDATE)
"""Names of the sides, by number."""
_RATE_ALPHA = 0.05  # of the exit rates that status shows


class Side(SideBuffers):
    """One side; see the module's docstring."""

    def __init__(self, number: int, layout: Layout, knobs_CK: Tensor, counts_C2: Tensor, device: torch.device) -> None:
        super().__init__(number, layout, knobs_CK, counts_C2, device)
        self.layout, self.policy = layout, Policy()
        self._probe_set: str | None = None
        """Digest of the probe set in the buffers. None where there is none yet."""
        self._learned_from: str | None = None
        """Digest of the probe set whose risks the adapter and the difficulty know."""
        self.adapter = Adapter(len(layout.checkpoint_layers))
        self.difficulty = Difficulty()
        self.has_thresholds = False
        self.exit_rates = [0.0] * max(1, len(layout.checkpoint_layers))
        self._last_counts = counts_C2.tolist()

    def configure(self, policy: Policy, loaded: Loaded, *, is_new: bool = False) -> None:
        """Take a policy that was validated, and its probe set; what was learned of other probes, or before `is_new`, is forgotten."""
        if loaded.sha256 != self._probe_set:
            for layer, buffer in zip(self.layout.checkpoint_layers, self.probes, strict=True):
                buffer.write(loaded.probes.get(layer))
            self._probe_set = loaded.sha256
        is_new = is_new or loaded.sha256 != self._learned_from
        self._learned_from = loaded.sha256
        if is_new:
            self.difficulty = Difficulty()
        self.policy = policy
        self.set_rule(policy)
        index_of_layer = {layer: i for i, layer in enumerate(self.layout.checkpoint_layers)}
        knobs_CK = torch.zeros(self.knobs_CK.shape, dtype=torch.float32)
        if policy.enabled:
            for c in policy.checkpoints:
                knobs_CK[index_of_layer[c.layer]] = torch.tensor([c.threshold, c.weight, c.target])
        self.adapter.configure(policy, knobs_CK[:, 0].tolist(), index_of_layer, is_new=is_new)
        self.knobs_CK.copy_(knobs_CK)
        self._write_thresholds()
        self.has_thresholds = bool((knobs_CK[:, 0] > 0).any())

    def clear(self) -> None:
        """Decide about nothing from now on; the probes stay where they are."""
        self.policy, self.has_thresholds = Policy(), False
        self.set_rule(self.policy)
        self.knobs_CK.zero_()

    def swap_learned(self, other: Side) -> None:
        """Exchange what two sides have learned, as a candidate becomes the stable policy."""
        self.adapter, other.adapter = other.adapter, self.adapter
        self.difficulty, other.difficulty = other.difficulty, self.difficulty
        self._learned_from, other._learned_from = other._learned_from, self._learned_from

    def follow(
        self,
        risk_CT: np.ndarray[Any, Any],
        scale_T: np.ndarray[Any, Any],
        mine_T: np.ndarray[Any, Any],
        counts: list[list[int]] | None = None,
        *,
        num_steps: int = 1,
    ) -> None:
        """Take a step's exits into the moving rates and, where adaptation is on, the risks of this side's tokens `mine_T` into the thresholds.

        `counts`: the totals as they were after the step, where the host reads them later; None: as they are. `num_steps`: taken together.
        """
        counts = self.counts_C2.tolist() if counts is None else counts
        alpha = 1 - (1 - _RATE_ALPHA) ** num_steps
        for i, (now, before) in enumerate(zip(counts, self._last_counts, strict=True)):
            if now[0] > before[0]:
                self.exit_rates[i] += alpha * ((now[1] - before[1]) / (now[0] - before[0]) - self.exit_rates[i])
        self._last_counts = counts
        if not self.adapter.is_on:
            return
        for i, risk_T in enumerate(risk_CT):
            seen_T = mine_T & ~np.isnan(risk_T)
            self.adapter.add(i, risk_T[seen_T] / np.maximum(scale_T[seen_T], 1e-9))
        if self.adapter.update():
            self._write_thresholds()

    def _write_thresholds(self) -> None:
        if self.adapter.is_on:
            self.knobs_CK[:, 0] = torch.tensor(self.adapter.thresholds, dtype=torch.float32)
