"""Levels of the kind `width`: the leading neurons in order of importance, the same for all tokens.

N rows, D hidden size, F neurons.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from sedac.engine.backends.kinds.base import Base, Kind
from sedac.engine.backends.neurons import NeuronWeights
from sedac.policy.model import FULL, SKIP
from sedac.probe.levels import activate


def _find_end(parameter: float, num_neurons: int) -> str:
    return FULL if parameter >= num_neurons else SKIP if parameter == 0 else ""


def _localize(parameter: float, counts: Mapping[int, int]) -> float:
    return counts.get(int(parameter), int(parameter))


def _compute(x_ND: Tensor, parameter: float, neurons: NeuronWeights | None, base: Base) -> tuple[Tensor, Tensor]:
    assert neurons is not None
    num_neurons = neurons.gate_FD.shape[0]
    width = min(int(parameter), num_neurons)
    active_NF = activate(functional.linear(x_ND, neurons.gate_FD[:width]), neurons.activation)
    h_NF = active_NF * functional.linear(x_ND, neurons.up_FD[:width])
    return h_NF @ neurons.down_FD[:width], torch.full((x_ND.shape[0],), width / num_neurons, device=x_ND.device)


WIDTH = Kind(name="width", find_end=_find_end, localize=_localize, compute=_compute)
