"""The gated MLP in plain torch: every token at its level, and tokens at level `full` bit for bit as vLLM computes them.

Under torch.compile it is one opaque operator around the base class's forward, for every module that maps (T, D) to (T, D) row by row
(quantised, LoRA, mixture of experts). Names, weights and the base class's own forward stay in use.
T tokens, N rows, D hidden size, F neurons, V levels.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from sedac.engine.backends.base import Backend, GatedMlp
from sedac.engine.backends.dense import why_not_dense
from sedac.engine.backends.kinds import KIND_FULL, KIND_SKIP, KINDS
from sedac.engine.backends.neurons import NeuronWeights, find_activation, sort_neurons
from sedac.engine.vllm.parts import (
    UnquantizedLinearMethod,
    direct_register_custom_op,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from sedac.probe.levels import Neurons

_MLPS: dict[str, GatedMlp] = {}
"""MLPs by module name, because operators can carry names, not objects."""


def _gated_mlp(x_TD: Tensor, level_T: Tensor, mlp_name: str) -> Tensor:
    return _MLPS[mlp_name].compute(x_TD)


def _gated_mlp_fake(x_TD: Tensor, level_T: Tensor, mlp_name: str) -> Tensor:
    return torch.empty_like(x_TD)


# The checkpoint operator writes `level_T`; naming it here orders this operator after it.
direct_register_custom_op("sedac_gated_mlp", _gated_mlp, fake_impl=_gated_mlp_fake)


@functools.cache
def _gated(base: Any) -> type[nn.Module]:
    def forward(self: Any, x_TD: Tensor) -> Tensor:
        """Compute the MLP, every row at its level."""
        if torch.compiler.is_compiling():
            out_TD: Tensor = torch.ops.vllm.sedac_gated_mlp(x_TD, self.sedac_level_T, self.sedac.name)
            return out_TD
        gated: GatedMlp = self.sedac
        return gated.compute(x_TD)

    return type(f"Gated{base.__name__}", (base,), {"forward": forward, "__module__": base.__module__})


class CopiedLinearMethod(UnquantizedLinearMethod):
    """vLLM's unquantised linear method (model_executor/layers/linear.py, 0.32), which packs the weights away, after a copy for reduced levels."""

    def __init__(self, gated: TorchMlp, part: str, inner: UnquantizedLinearMethod) -> None:
        """`part` of the MLP: gate_up or down."""
        self.__dict__.update(inner.__dict__)
        self.gated, self.part = gated, part

    def process_weights_after_loading(self, layer: Any) -> None:
        """Copy what reduced levels read, then let vLLM pack the weights."""
        self.gated.copy_weights(self.part, layer.weight)
        super().process_weights_after_loading(layer)


class TorchMlp(GatedMlp):
    """One MLP; see the module's docstring."""

    def __init__(self, backend: Backend, module: Any, name: str, layer: int, source: Neurons | None, *, scores_activation: bool, lora: bool) -> None:
        super().__init__(backend, module, name, layer)
        self.neurons: NeuronWeights | None = None
        """Weights by neuron. They are there after `finish`, where the probe set has reduced levels."""
        self._source, self._scores_activation, self._whole_rows = source, scores_activation, lora
        self._copies: dict[str, Tensor] = {}
        _MLPS[name] = self
        if not lora and not why_not_dense(module):
            self.replace_methods()
        self.gate(_gated)

    def replace_methods(self) -> None:
        """Watch the loading of a plain dense MLP's weights, where reduced levels will read them."""
        if self._source is not None:
            for part in ("gate_up", "down"):
                linear = getattr(self.module, f"{part}_proj")
                linear.quant_method = CopiedLinearMethod(self, part, linear.quant_method)

    def allocate(self, shape: tuple[int, int], weight: Tensor) -> Tensor:
        """Return memory for a copy of weights."""
        return torch.empty(shape, dtype=weight.dtype, device=weight.device)

    def copy_weights(self, part: str, weight: Tensor) -> None:
        """Copy the loaded weights of a part, gate_up (2F, D) or down (D, F), a row per neuron; nothing without reduced levels."""
        source = self._source
        if source is None:
            return
        order_F, _ = sort_neurons(source, get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())
        size = order_F.numel()
        if part == "gate_up":
            for name, start in (("gate", 0), ("up", size)):
                copy_FD = self.allocate((size, weight.shape[1]), weight)
                torch.index_select(weight.data[start : start + size], 0, order_F.to(weight.device), out=copy_FD)
                self._copies[name] = copy_FD
            return
        down_FD = self.allocate((size, weight.shape[0]), weight)
        if source.repair_FD is not None:
            first = get_tensor_model_parallel_rank() * size
            down_FD.copy_(source.repair_FD[first : first + size].to(weight.dtype)[order_F])
        else:
            down_FD.copy_(weight.data.t()[order_F])
        self._copies["down"] = down_FD

    def finish(self) -> None:
        """Take the copies of the loaded weights."""
        counts: dict[int, int] = {}
        if self._copies:
            source, device = self._source, self.backend.buffers.level_T.device
            activation = find_activation(getattr(self.module, "act_fn", None))
            assert source is not None
            assert activation is not None
            world_size, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
            order_F, counts = sort_neurons(source, rank, world_size)
            size = order_F.numel()
            natural_F = source.scale_F[rank * size : (rank + 1) * size].float()
            self.natural_scale_F = natural_F.to(device)
            self.neurons = NeuronWeights(
                gate_FD=self._copies["gate"], up_FD=self._copies["up"], down_FD=self._copies["down"], scale_F=natural_F[order_F].to(device),
                order_F=order_F, repaired=source.repair_FD is not None, activation=activation, scores_activation=self._scores_activation,
            )  # fmt: skip
            self._copies, self._source = {}, None
        self.kind_V, self.parameter_V = self.backend.table.make_row(self.layer, counts, has_neurons=self.neurons is not None)

    def compute(self, x_TD: Tensor) -> Tensor:
        """Compute every row at its level."""
        if not self.backend.is_active:
            return self.base(x_TD)
        buffers, num_rows = self.backend.buffers, x_TD.shape[0]
        level_T = buffers.level_T[:num_rows].long()
        kind_T = self.kind_V[level_T]
        full = (kind_T == KIND_FULL).nonzero().squeeze(1)
        if full.numel() == num_rows:
            return self.base(x_TD)
        saved_T = buffers.saved_T
        saved_T[:num_rows] += kind_T == KIND_SKIP
        out_TD = torch.zeros_like(x_TD)
        if self._whole_rows and full.numel():  # LoRA reads its adapters by row number, so rows must keep theirs
            out_TD = self.base(x_TD) * (kind_T == KIND_FULL).unsqueeze(1)
        elif full.numel():
            out_TD.index_copy_(0, full, self.base(x_TD.index_select(0, full)))
        parameter_T = self.parameter_V[level_T]
        for number in kind_T[kind_T > KIND_SKIP].unique().tolist():
            for parameter in parameter_T[kind_T == number].unique().tolist():
                rows = ((kind_T == number) & (parameter_T == parameter)).nonzero().squeeze(1)
                reduced_ND, computed_N = KINDS[number].compute(x_TD.index_select(0, rows), parameter, self.neurons, self.base)
                out_TD.index_copy_(0, rows, reduced_ND)
                saved_T[rows] += 1 - computed_N
        return out_TD
