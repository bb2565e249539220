"""The decision rule of one checkpoint, pure: which tokens are confident here, and at which level they go on.

The engine's plain form, the oracle of its native kernel (engine/backends/kernels/checkpoint.cpp), and what the workshop simulates with.
N tokens that may still be decided about.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sedac.policy.model import Rule, Scope


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """What one checkpoint decides by."""

    threshold: float
    """A risk below it counts as confident. 0 means that the checkpoint is off."""
    weight: float = 1.0
    target: float = 0.5
    rule: Rule = "first"
    scope: Scope = "token"
    decay: float = 0.9


def decide(risk_N: Tensor, scale_N: Tensor, confidence_N: Tensor, knobs: Knobs) -> tuple[Tensor, Tensor]:
    """Return bool (N,), the confident tokens, and the accumulated confidence (N,), fp32.

    A token's own threshold is `knobs.threshold * scale_N`. Rules `first` and `single`: risk below it. Rule `accumulate`:
    C = C * decay + clamp((threshold - risk) / threshold, 0, 1) * weight, confident from the checkpoint's target on. Scope
    `batch`: all of them are confident, or none is. NaN is never confident, and a threshold of 0 makes nobody confident.
    """
    limit_N = knobs.threshold * scale_N.float()
    sure_N = risk_N < limit_N
    if knobs.rule == "accumulate":
        now_N = torch.where(sure_N, (limit_N - risk_N) / limit_N, 0.0)
        confidence_N = confidence_N * knobs.decay + now_N * knobs.weight
        sure_N = confidence_N >= knobs.target
    if knobs.scope == "batch":
        sure_N = sure_N.all().expand_as(sure_N)
    return sure_N, confidence_N


def get_soft_ratio(confidence_N: Tensor) -> Tensor:
    """Return the share of MLP work (N,) that soft exit gives up: tanh(2C - 1) / 2 + 1/2, the published rule of SEDAC v6.1."""
    return torch.tanh(2 * confidence_N - 1) / 2 + 0.5
