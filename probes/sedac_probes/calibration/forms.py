"""The forms that the workshop compares: every token at one level, tokens chosen by probes or by chance, and the published soft exit.

Called by `calibrate` and `compare`. T tokens (B sequences of S), D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from sedac.probe.cascade import Knobs, decide, get_soft_ratio
from sedac.probe.levels import Level, Neurons, Score, reduce_mlp
from sedac.probe.probe import LREProbe
from torch import Tensor

from sedac_probes.calibration.reduced import Batch, Form, Plain


class Skip(Plain):
    """No MLP at all."""

    def compute(self, layer: int, x_TD: Tensor, mlp: Any) -> tuple[Tensor, Tensor]:
        """Add nothing to the stream."""
        return torch.zeros_like(x_TD), torch.zeros(x_TD.shape[0])


class AtLevel(Plain):
    """Every token at one level of a probe set."""

    def __init__(self, level: Level, neurons: Mapping[int, Neurons], activation: str, score: Score) -> None:
        self.level, self.neurons, self.activation, self.score = level, neurons, activation, score

    def compute(self, layer: int, x_TD: Tensor, mlp: Any) -> tuple[Tensor, Tensor]:
        """Compute what the level leaves, by the reference of the engine's kernels."""
        weights = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
        return reduce_mlp(x_TD, *weights, level=self.level, layer=layer, neurons=self.neurons[layer], activation=self.activation, score=self.score)


class Decided(Plain):
    """A level for every token, and another one, above the checkpoint, for tokens that the rule finds confident."""

    def __init__(self, probes: Mapping[int, LREProbe], knobs: Mapping[int, Knobs], *, floor: Form | None = None, level: Form | None = None) -> None:
        self.probes, self.knobs, self.floor, self.level = probes, knobs, floor or Plain(), level or Skip()
        self.num_decided = dict.fromkeys(knobs, 0)
        """Tokens that became confident at each checkpoint, over all passes."""
        self.num_tokens = 0

    def begin(self, batch: Batch) -> None:
        """Start with nobody confident."""
        self._batch = batch
        self._sure_T = torch.zeros(batch.ids_BS.numel(), dtype=torch.bool)
        self._confidence_T = torch.zeros(batch.ids_BS.numel())
        self.num_tokens += int(batch.real_BS.sum())

    def watch(self, layer: int, stream_TD: Tensor) -> None:
        """Let the rule decide at a checkpoint about those who are not confident yet."""
        if layer not in self.knobs:
            return
        new_T = self._decide(layer, stream_TD) & ~self._sure_T
        self._sure_T |= new_T
        self.num_decided[layer] += int((new_T & self._batch.real_BS.flatten()).sum())

    def _decide(self, layer: int, stream_TD: Tensor) -> Tensor:
        risk_T, knobs = self.probes[layer](stream_TD), self.knobs[layer]
        if knobs.scope == "batch":  # one position of all sequences is one step's batch, as when they are generated together
            real_BS = self._batch.real_BS
            risk_BS = torch.where(real_BS, risk_T.view_as(real_BS), -1.0)
            risk_T = risk_BS.max(dim=0).values.expand_as(risk_BS).flatten()
        sure_T, confidence_T = decide(risk_T, torch.ones_like(risk_T), self._confidence_T, Knobs(**{**vars(knobs), "scope": "token"}))
        self._confidence_T = torch.where(self._sure_T, self._confidence_T, confidence_T)
        return sure_T

    def compute(self, layer: int, x_TD: Tensor, mlp: Any) -> tuple[Tensor, Tensor]:
        """Compute each token at its level."""
        y_TD, computed_T = self.floor.compute(layer, x_TD, mlp)
        if self._sure_T.any():
            y_TD, computed_T = y_TD.clone(), computed_T.clone()
            y_TD[self._sure_T], computed_T[self._sure_T] = self.level.compute(layer, x_TD[self._sure_T], mlp)
        return y_TD, computed_T


class Randomly(Decided):
    """As many tokens as a `Decided` that has run found confident at each checkpoint, but chosen by chance."""

    def __init__(self, like: Decided) -> None:
        super().__init__(like.probes, like.knobs, floor=like.floor, level=like.level)
        self.like = like

    def begin(self, batch: Batch) -> None:
        """Start with nobody confident, and the same dice on the same text."""
        super().begin(batch)
        self._dice = torch.Generator().manual_seed(int(batch.ids_BS.sum()))

    def _decide(self, layer: int, stream_TD: Tensor) -> Tensor:
        earlier = sum(n for at, n in self.like.num_decided.items() if at < layer)
        share = self.like.num_decided[layer] / max(1, self.like.num_tokens - earlier)
        return torch.rand(stream_TD.shape[0], generator=self._dice) < share


class SoftExit(Decided):
    """SEDAC v6.1 as published: confident tokens' MLP outputs are computed, then scaled by 1 - ratio. It saves nothing."""

    def compute(self, layer: int, x_TD: Tensor, mlp: Any) -> tuple[Tensor, Tensor]:
        """Compute all of it and keep a part."""
        y_TD, computed_T = Plain.compute(self, layer, x_TD, mlp)
        kept_T = torch.where(self._sure_T, 1 - get_soft_ratio(self._confidence_T), 1.0)
        return y_TD * kept_T[:, None], computed_T
