"""The gated MLP: every token at its level, and tokens at level `full` bit for bit as vLLM computes them.

`attach` swaps an MLP's class and, where the MLP is a plain dense one, the methods of its two linear layers; names, weights and
the base class's own forward stay in use. Two ways through it:
- native: vLLM's two matrix products become the operators `sedac::gate_up` and `sedac::down` (kernels/mlp.cpp);
- plain: one opaque operator around the base class's forward, for every other module that maps (T, D) to (T, D) row by row
  (quantised, LoRA, mixture of experts), and where the kernels were not built.
On a GPU both are replaced by cuda/gated.py.
T tokens, D hidden size, F neurons.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from sedac.engine.backends.levels import ACTIVATIONS, KIND_CONTEXTUAL, KIND_FULL, KIND_SKIP, KIND_WIDTH, NeuronWeights, find_activation, sort_neurons
from sedac.engine.step.state import State
from sedac.engine.vllm.parts import (
    UnquantizedLinearMethod,
    direct_register_custom_op,
    find_handler,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from sedac.probe.levels import Neurons

_MLPS: dict[str, nn.Module] = {}
"""by module name; operators can carry names, not objects"""


def _compute(mlp: Any, base: type[nn.Module], x_TD: Tensor) -> Tensor:
    """Compute every row at its level in plain torch."""
    state: State = mlp.sedac_state
    if not state.is_active:
        return base.forward(mlp, x_TD)
    table, layer = state.table, mlp.sedac_layer
    level_T = state.level_T[: x_TD.shape[0]].long()
    kind_T = table.kind_LV[layer][level_T]
    neurons: NeuronWeights | None = mlp.sedac_neurons
    if neurons is None:
        kind_T = torch.where(kind_T == KIND_SKIP, KIND_SKIP, KIND_FULL)
    full = (kind_T == KIND_FULL).nonzero().squeeze(1)
    if full.numel() == x_TD.shape[0]:
        return base.forward(mlp, x_TD)
    saved_T = state.saved_T
    saved_T[: x_TD.shape[0]] += kind_T == KIND_SKIP
    out_TD = torch.zeros_like(x_TD)
    if mlp.sedac_whole_rows and full.numel():  # LoRA reads its adapters by row number, so rows must keep theirs
        out_TD = base.forward(mlp, x_TD) * (kind_T == KIND_FULL).unsqueeze(1)
    elif full.numel():
        out_TD.index_copy_(0, full, base.forward(mlp, x_TD.index_select(0, full)))
    if neurons is None:
        return out_TD
    parameter_T = table.parameter_LV[layer][level_T]
    for kind in (KIND_WIDTH, KIND_CONTEXTUAL):
        for parameter in parameter_T[kind_T == kind].unique().tolist():
            rows = ((kind_T == kind) & (parameter_T == parameter)).nonzero().squeeze(1)
            reduced_ND, computed_N = neurons.compute(x_TD.index_select(0, rows), kind, parameter)
            out_TD.index_copy_(0, rows, reduced_ND)
            saved_T[rows] += 1 - computed_N
    return out_TD


def _gated_mlp(x_TD: Tensor, level_T: Tensor, mlp_name: str) -> Tensor:
    mlp = _MLPS[mlp_name]
    return _compute(mlp, type(mlp).__bases__[0], x_TD)


def _gated_mlp_fake(x_TD: Tensor, level_T: Tensor, mlp_name: str) -> Tensor:
    return torch.empty_like(x_TD)


# The checkpoint operator writes `level_T`; naming it here orders this operator after it.
direct_register_custom_op("sedac_gated_mlp", _gated_mlp, fake_impl=_gated_mlp_fake)


@functools.cache
def _gated(base: Any) -> type[nn.Module]:
    def forward(self: Any, x_TD: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            if self.sedac_native:
                return base.forward(self, x_TD)
            out_TD: Tensor = torch.ops.vllm.sedac_gated_mlp(x_TD, self.sedac_level_T, self.sedac_name)
            return out_TD
        if self.sedac_native:
            skipped: Tensor | None = torch.ops.sedac.skip_all(x_TD, self.sedac_layer) if self.sedac_state.is_active else None
            return base.forward(self, x_TD) if skipped is None else skipped
        return _compute(self, base, x_TD)

    return type(f"Gated{base.__name__}", (base,), {"forward": forward, "__module__": base.__module__})


class GatedLinearMethod(UnquantizedLinearMethod):
    """vLLM's unquantised linear method (model_executor/layers/linear.py, 0.32) whose products are SEDAC's operators.

    It keeps a neuron-major copy of the weights where the probe set has reduced levels, because vLLM packs the weights away
    for its own kernels; without levels it keeps nothing.
    """

    def __init__(self, mlp: Any, part: str, inner: UnquantizedLinearMethod) -> None:
        self.__dict__.update(inner.__dict__)
        self.mlp, self.part = mlp, part

    def process_weights_after_loading(self, layer: Any) -> None:
        """Copy what reduced levels read, then let vLLM pack the weights."""
        if self.mlp.sedac_source is not None:
            self._copy(layer.weight)
        super().process_weights_after_loading(layer)
        self.mlp.sedac_handlers[self.part] = find_handler(layer)

    def _copy(self, weight: Tensor) -> None:
        mlp = self.mlp
        source: Neurons = mlp.sedac_source
        order_F, mlp.sedac_counts = sort_neurons(source, get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())
        make = torch.ops.sedac.empty_huge if mlp.sedac_state.native else functools.partial(torch.empty, device=weight.device)
        size = order_F.numel()
        if self.part == "gate_up":
            hidden_size = weight.shape[1]
            for name, start in (("gate", 0), ("up", size)):
                copy_FD = make((size, hidden_size), dtype=weight.dtype)
                torch.index_select(weight.data[start : start + size], 0, order_F.to(weight.device), out=copy_FD)
                mlp.sedac_copies[name] = copy_FD
            return
        down_FD = make((size, weight.shape[0]), dtype=weight.dtype)
        if source.repair_FD is not None:
            first = get_tensor_model_parallel_rank() * size
            down_FD.copy_(source.repair_FD[first : first + size].to(weight.dtype)[order_F])
        else:
            down_FD.copy_(weight.data.t()[order_F])
        mlp.sedac_copies["down"] = down_FD

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply, each row at its level; (T, D) -> (T, 2F) or (T, F) -> (T, D)."""
        mlp = self.mlp
        if not mlp.sedac_native:
            return super().apply(layer, x, bias)
        if self.part == "gate_up":
            return torch.ops.sedac.gate_up(x, mlp.sedac_level_T, mlp.sedac_layer, mlp.sedac_num_outputs, not torch.compiler.is_compiling())
        return torch.ops.sedac.down(x, mlp.sedac_level_T, mlp.sedac_layer, mlp.sedac_hidden_size)


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


def attach(mlp: Any, name: str, layer: int, state: State, neurons: Neurons | None, *, scores_activation: bool, lora: bool) -> None:
    """Gate the MLP of decoder layer `layer`, called `name` in the model; `neurons` where the probe set has reduced levels."""
    if state.device_forms is not None:
        from sedac.engine.backends.cuda import gated

        gated.attach(mlp, name, layer, state, neurons, scores_activation=scores_activation, lora=lora)
        return
    _MLPS[name] = mlp
    mlp.sedac_name, mlp.sedac_layer, mlp.sedac_state = name, layer, state
    mlp.register_buffer("sedac_level_T", state.level_T, persistent=False)
    mlp.sedac_native, mlp.sedac_neurons, mlp.sedac_whole_rows = False, None, lora
    mlp.sedac_source, mlp.sedac_scores_activation = neurons, scores_activation
    mlp.sedac_handlers, mlp.sedac_copies, mlp.sedac_counts = {}, {}, {}
    if not lora and not why_not_dense(mlp) and (state.native or neurons is not None):
        mlp.sedac_hidden_size = mlp.down_proj.output_size
        mlp.sedac_num_outputs = sum(mlp.gate_up_proj.output_partition_sizes)
        mlp.gate_up_proj.quant_method = GatedLinearMethod(mlp, "gate_up", mlp.gate_up_proj.quant_method)
        mlp.down_proj.quant_method = GatedLinearMethod(mlp, "down", mlp.down_proj.quant_method)
    base: Any = type(mlp)
    mlp.__class__ = _gated(base)


def finish(mlp: Any) -> None:
    """After the weights are loaded: hand the MLP to the native kernels or to the GPU's, or keep to plain torch."""
    if mlp.sedac_state.device_forms is not None:
        from sedac.engine.backends.cuda import gated

        gated.finish(mlp, why_not_dense(mlp))
        return
    activation = find_activation(getattr(mlp, "act_fn", None))
    if mlp.sedac_copies:
        source: Neurons = mlp.sedac_source
        assert activation is not None
        world_size, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        order_F, counts = sort_neurons(source, rank, world_size)
        size = order_F.numel()
        natural_F = source.scale_F[rank * size : (rank + 1) * size].float()
        mlp.sedac_natural_scale = natural_F.to(mlp.sedac_level_T.device)
        mlp.sedac_neurons = NeuronWeights(
            gate_FD=mlp.sedac_copies["gate"], up_FD=mlp.sedac_copies["up"], down_FD=mlp.sedac_copies["down"],
            scale_F=natural_F[order_F].to(mlp.sedac_level_T.device), order_F=order_F, repaired=source.repair_FD is not None,
            activation=activation, scores_activation=mlp.sedac_scores_activation, counts=counts,
        )  # fmt: skip
        mlp.sedac_copies, mlp.sedac_source = {}, None
    handlers = [mlp.sedac_handlers.get(part) for part in ("gate_up", "down")]
    if not mlp.sedac_state.native or any(handler is None for handler in handlers) or activation is None:
        return
    ops, neurons, table, layer = torch.ops.sedac, mlp.sedac_neurons, mlp.sedac_state.table, mlp.sedac_layer
    parameter_V = table.parameter_LV[layer]
    if neurons is not None and neurons.counts:
        parameter_V = parameter_V.clone()
        for i in (table.kind_LV[layer] == KIND_WIDTH).nonzero().flatten().tolist():
            parameter_V[i] = neurons.counts[int(parameter_V[i])]
    kind_V = table.kind_LV[layer].clone()
    if neurons is None:
        kind_V[kind_V > KIND_SKIP] = KIND_FULL
    ops.add_mlp(layer, *handlers, mlp.sedac_hidden_size, kind_V, parameter_V.contiguous(), ACTIVATIONS[activation])
    if neurons is not None:
        order = neurons.order_F if neurons.repaired else None
        ops.set_neurons(
            layer, neurons.gate_FD, neurons.up_FD, neurons.down_FD, neurons.scale_F, mlp.sedac_natural_scale, order, neurons.scores_activation
        )
    mlp.sedac_native = True


def warm_up(mlp: Any, hidden_size: int, dtype: torch.dtype) -> None:
    """Run the base MLP on one and on two rows, so that what vLLM compiles inside it by size is ready before requests come."""
    base: Any = type(mlp).__bases__[0]
    with torch.inference_mode():
        for rows in (1, 2):
            base.forward(mlp, torch.zeros(rows, hidden_size, dtype=dtype, device=mlp.sedac_level_T.device))
