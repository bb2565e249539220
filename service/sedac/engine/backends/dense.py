"""What an MLP of vLLM is made of: whether reduced levels can read it, and where vLLM has packed its weights."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from sedac.engine.backends.neurons import find_activation


def find_handler(layer: Any) -> Tensor | None:
    """Return the oneDNN handler that vLLM packed a layer's weights into; None where it took another kernel."""
    linear = getattr(layer, "cpu_linear", None)
    handler = inspect.getclosurevars(linear).nonlocals.get("handler") if inspect.isfunction(linear) else None
    return getattr(handler, "handler_tensor", None)


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
