"""The sides of an engine: the stable policy, and while a roll-out is under way its candidate beside it.

Each side has all that decides about its tokens: policy, knobs, probes, adapted thresholds and the difficulty of prompts. The `State`
drives it between steps. What the kernels read lies in buffers whose addresses stay for the life of the engine; configuring a side
writes into them. C checkpoints, D hidden size, R the largest rank that can be loaded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sedac.engine.step.adaptation import Adapter, Difficulty
from sedac.engine.step.probe_sets import Loaded
from sedac.engine.step.tokens import OF_CANDIDATE
from sedac.policy.layout import Layout
from sedac.policy.model import CANDIDATE, STABLE, Policy
from sedac.probe.cascade import Knobs
from sedac.probe.probe import LREProbe

SIDES = (STABLE, CANDIDATE)
"""by number"""
_RULES = {"first": 0, "single": 0, "accumulate": 1}
_SCOPES = {"token": 0, "batch": 1}
_RATE_ALPHA = 0.05  # of the exit rates that status shows


class ProbeBuffer:
    """Room for one probe of any rank up to the largest, in fp32: (R + 1) * D * 4 bytes and a little."""

    def __init__(self, hidden_size: int, max_rank: int, device: torch.device) -> None:
        def make(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        self.down_RD, self.norm_weight_R, self.norm_bias_R = make(max_rank, hidden_size), make(max_rank), make(max_rank)
        self.out_weight_1R, self.out_bias = make(1, max_rank), make(1)
        self.rank = torch.zeros(1, dtype=torch.int64, device=device)
        """leading rows in use; 0: no probe"""
        self.probe: LREProbe | None = None
        """reads the rows in use, where they lie"""

    @property
    def tensors(self) -> list[Tensor]:
        """The weights, in the kernels' order."""
        return [self.down_RD, self.norm_weight_R, self.norm_bias_R, self.out_weight_1R, self.out_bias]

    def write(self, probe: LREProbe | None) -> None:
        """Copy a probe in, or take the one there out of use."""
        rank = probe.down.out_features if probe else 0
        self.rank.fill_(rank)
        views = {
            "down.weight": self.down_RD[:rank],
            "norm.weight": self.norm_weight_R[:rank],
            "norm.bias": self.norm_bias_R[:rank],
            "out.weight": self.out_weight_1R[:, :rank],
            "out.bias": self.out_bias,
        }
        for name, tensor in (probe.state_dict() if probe else {}).items():
            views[name].copy_(tensor)
        self.probe = LREProbe.from_tensors(views) if probe else None


class Side:
    """One side; see the module's docstring."""

    def __init__(self, number: int, layout: Layout, knobs_CK: Tensor, counts_C2: Tensor, device: torch.device) -> None:
        self.number, self.layout = number, layout
        self.role = OF_CANDIDATE * number
        """bit of its tokens' roles"""
        self.policy = Policy()
        self.knobs_CK, self.counts_C2 = knobs_CK, counts_C2
        """threshold, weight, target; evaluated, exited since the worker started"""
        self.probes = [ProbeBuffer(layout.hidden_size, layout.max_rank, device) for _ in layout.checkpoint_layers]
        self._probe_set: str | None = None
        """digest of the set in the buffers; None: none yet"""
        self._learned_from: str | None = None
        """digest of the set whose risks the adapter and the difficulty know"""
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
        index_of_layer = {layer: i for i, layer in enumerate(self.layout.checkpoint_layers)}
        knobs_CK = torch.zeros(self.knobs_CK.shape, dtype=torch.float32)
        if policy.enabled:
            for c in policy.checkpoints:
                knobs_CK[index_of_layer[c.layer]] = torch.tensor([c.threshold, c.weight, c.target])
        self.adapter.configure(policy, knobs_CK[:, 0].tolist(), index_of_layer, is_new=is_new)
        self.knobs_CK.copy_(knobs_CK)
        self._write_thresholds()
        self.has_thresholds = bool((knobs_CK[:, 0] > 0).any())

    @property
    def rule(self) -> tuple[int, int, float]:
        """The policy's rule (1: accumulate), scope (1: batch) and decay, as the kernels take them."""
        return _RULES[self.policy.rule], _SCOPES[self.policy.scope], self.policy.decay

    def clear(self) -> None:
        """Decide about nothing from now on; the probes stay where they are."""
        self.policy, self.has_thresholds = Policy(), False
        self.knobs_CK.zero_()

    def swap_learned(self, other: Side) -> None:
        """Exchange what two sides have learned, as a candidate becomes the stable policy."""
        self.adapter, other.adapter = other.adapter, self.adapter
        self.difficulty, other.difficulty = other.difficulty, self.difficulty
        self._learned_from, other._learned_from = other._learned_from, self._learned_from

    def get_knobs(self, index: int) -> Knobs:
        """Return what checkpoint `index` decides by now."""
        threshold, weight, target = self.knobs_CK[index].tolist()
        policy = self.policy
        return Knobs(threshold=threshold, weight=weight, target=target, rule=policy.rule, scope=policy.scope, decay=policy.decay)

    def follow(
        self, risk_CT: np.ndarray[Any, Any], scale_T: np.ndarray[Any, Any], mine_T: np.ndarray[Any, Any], counts: list[list[int]] | None = None
    ) -> None:
        """Take a step's exits into the moving rates and, where adaptation is on, the risks of this side's tokens `mine_T` into the thresholds.

        `counts`: the totals as they were after the step, where the host reads them later; None: as they are.
        """
        counts = self.counts_C2.tolist() if counts is None else counts
        for i, (now, before) in enumerate(zip(counts, self._last_counts, strict=True)):
            if now[0] > before[0]:
                self.exit_rates[i] += _RATE_ALPHA * ((now[1] - before[1]) / (now[0] - before[0]) - self.exit_rates[i])
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
