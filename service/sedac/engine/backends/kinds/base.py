"""What a kind of level is, and the two kinds that every backend has.

N rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from sedac.engine.backends.neurons import NeuronWeights
from sedac.policy.model import FULL, SKIP

Base = Callable[[Tensor], Tensor]
"""An MLP as vLLM has it, (N, D) -> (N, D)."""
Compute = Callable[[Tensor, float, NeuronWeights | None, Base], tuple[Tensor, Tensor]]


def _keep(parameter: float, counts: Mapping[int, int]) -> float:
    return parameter


def _refuse(x_ND: Tensor, parameter: float, neurons: NeuronWeights | None, base: Base) -> tuple[Tensor, Tensor]:
    raise AssertionError("rows in full and skipped rows are no matter of a kind's own computing")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How levels of one kind reduce an MLP, and their plain torch form."""

    name: str
    """Name of the kind, as levels of a probe set have it (`Level.reduction`)."""
    needs_neurons: bool = True
    """Whether it computes from the neuron-major weights. An MLP without them is computed in full instead."""
    find_end: Callable[[float, int], str] = lambda parameter, num_neurons: ""
    """Maps (a layer's parameter, neurons of the whole MLP) to FULL or SKIP where that is what it comes to. Empty where it is neither."""
    localize: Callable[[float, Mapping[int, int]], float] = _keep
    """Maps (parameter of the whole MLP, this rank's among the leading k neurons by k) to this rank's parameter."""
    compute: Compute = _refuse
    """Maps (rows (N, D), parameter, weights or None, the MLP as vLLM has it) to (result (N, D), share of the MLP's work (N,))."""


FULL_KIND = Kind(name=FULL, needs_neurons=False)
SKIP_KIND = Kind(name=SKIP, needs_neurons=False)
