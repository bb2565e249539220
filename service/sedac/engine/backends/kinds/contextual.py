"""Levels of the kind `contextual`: each token's own neurons, those whose score passes the level's threshold.

N rows, D hidden size, F neurons.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional

from sedac.engine.backends.kinds.base import Base, Kind
from sedac.engine.backends.neurons import NeuronWeights
from sedac.policy.model import FULL, SKIP
from sedac.probe.levels import activate


def _find_end(parameter: float, num_neurons: int) -> str:
    return FULL if parameter <= 0 else SKIP if math.isinf(parameter) else ""


def _compute(x_ND: Tensor, parameter: float, neurons: NeuronWeights | None, base: Base) -> tuple[Tensor, Tensor]:
    assert neurons is not None
    gate_NF = functional.linear(x_ND, neurons.gate_FD)
    active_NF = activate(gate_NF, neurons.activation)
    h_NF = active_NF * functional.linear(x_ND, neurons.up_FD)
    keep_NF = (active_NF if neurons.scores_activation else gate_NF).float().abs() * neurons.scale_F >= parameter
    return (h_NF * keep_NF) @ neurons.down_FD, (1 + 2 * keep_NF.float().mean(-1)) / 3


CONTEXTUAL = Kind(name="contextual", find_end=_find_end, compute=_compute)
