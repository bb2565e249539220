"""Whether reduced levels can read an MLP of vLLM."""

from __future__ import annotations

from typing import Any

from sedac.engine.backends.neurons import find_activation
from sedac.engine.vllm.parts import UnquantizedLinearMethod


def why_not_dense(mlp: Any) -> str:
    """Say why an MLP can't take reduced levels, only `full` and `skip`; empty where it can."""
    gate_up, down = getattr(mlp, "gate_up_proj", None), getattr(mlp, "down_proj", None)
    if gate_up is None or down is None:
        return "has no gate_up_proj and down_proj"
    for layer in (gate_up, down):
        method = type(getattr(layer, "quant_method", None))
        if method is not UnquantizedLinearMethod:
            return f"is quantised ({method.__name__})"
        if getattr(layer, "bias", None) is not None:
            return "has biases"
    if find_activation(getattr(mlp, "act_fn", None)) is None:
        return f"has the activation {type(getattr(mlp, 'act_fn', None)).__name__}"
    return ""
