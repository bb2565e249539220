"""The gated MLP on the CPU: vLLM's two matrix products become the operators `sedac::gate_up` and `sedac::down` (kernels/mlp.cpp).

Between them vLLM's own activation runs. Where the kernels can't take a module, it is computed as torch_mlp.py does.
T tokens, D hidden size, F neurons, V levels.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from sedac.engine.backends.neurons import ACTIVATIONS, find_activation
from sedac.engine.backends.torch_mlp import CopiedLinearMethod, TorchMlp
from sedac.engine.vllm.parts import Weights, find_weights


@functools.cache
def _with_kernels(gated: Any) -> type[nn.Module]:
    base = gated.__bases__[0]

    def forward(self: Any, x_TD: Tensor) -> Tensor:
        """Leave the MLP out where all rows skip it, else compute it as the base class does."""
        if not torch.compiler.is_compiling() and self.sedac.backend.is_active:
            skipped: Tensor | None = torch.ops.sedac.skip_all(x_TD, self.sedac.layer)
            if skipped is not None:
                return skipped
        out_TD: Tensor = base.forward(self, x_TD)
        return out_TD

    return type(gated.__name__, (base,), {"forward": forward, "__module__": base.__module__})


class GatedLinearMethod(CopiedLinearMethod):
    """vLLM's unquantised linear method (model_executor/layers/linear.py, 0.32) whose products are SEDAC's operators."""

    gated: CpuMlp

    def process_weights_after_loading(self, layer: Any) -> None:
        """Copy what reduced levels read, let vLLM pack the weights, and keep where it has."""
        super().process_weights_after_loading(layer)
        self.gated.weights[self.part] = find_weights(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply, each row at its level; (T, D) -> (T, 2F) or (T, F) -> (T, D)."""
        gated = self.gated
        if not gated.has_kernels:
            return super().apply(layer, x, bias)
        if self.part == "gate_up":
            return torch.ops.sedac.gate_up(x, gated.module.sedac_level_T, gated.layer, gated.num_outputs, not torch.compiler.is_compiling())
        return torch.ops.sedac.down(x, gated.module.sedac_level_T, gated.layer, gated.hidden_size)


class CpuMlp(TorchMlp):
    """One MLP; see the module's docstring."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self.has_kernels = False
        """Whether the operators compute it, known after `finish`."""
        self.weights: dict[str, Weights | None] = {}
        """Where vLLM keeps the weights, by part."""
        super().__init__(*arguments, **keywords)

    def replace_methods(self) -> None:
        """Put the operators in the place of a plain dense MLP's two products."""
        self.hidden_size: int = self.module.down_proj.output_size
        self.num_outputs: int = sum(self.module.gate_up_proj.output_partition_sizes)
        for part in ("gate_up", "down"):
            linear = getattr(self.module, f"{part}_proj")
            linear.quant_method = GatedLinearMethod(self, part, linear.quant_method)

    def allocate(self, shape: tuple[int, int], weight: Tensor) -> Tensor:
        """Return memory on huge pages."""
        memory: Tensor = torch.ops.sedac.empty_huge(shape, dtype=weight.dtype)
        return memory

    def finish(self) -> None:
        """Hand the MLP to the kernels, or keep to plain torch."""
        super().finish()
        activation = find_activation(getattr(self.module, "act_fn", None))
        gate_up, down = (self.weights.get(part) for part in ("gate_up", "down"))
        if gate_up is None or down is None or activation is None:
            return
        ops, neurons = torch.ops.sedac, self.neurons
        numbers = (ACTIVATIONS[activation], gate_up.form, down.form)
        ops.add_mlp(self.layer, gate_up.tensor, down.tensor, self.hidden_size, self.kind_V, self.parameter_V, *numbers)
        if neurons is not None:
            order_F = neurons.order_F if neurons.repaired else None
            ops.set_neurons(
                self.layer, neurons.gate_FD, neurons.up_FD, neurons.down_FD, neurons.scale_F, self.natural_scale_F, order_F, neurons.scores_activation
            )
        self.has_kernels, self.needs_warm_up = True, False
        gated: Any = type(self.module)
        self.module.__class__ = _with_kernels(gated)
