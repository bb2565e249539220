"""The gated MLP of a model on a GPU: one opaque operator per MLP that a CUDA graph captures with every form's launches.

The MLP's class is swapped when the model is built, its weights are read once they are loaded. Under tensor parallelism the sum over
ranks comes after the operator, outside all IF nodes.
T tokens, D hidden size, F neurons of this rank, V levels.
"""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sedac.engine.backends.base import GatedMlp
from sedac.engine.backends.cuda.device import DeviceBackend
from sedac.engine.backends.cuda.guard import is_capturing
from sedac.engine.backends.cuda.mlp import DeviceMlp, DeviceNeurons, Parts
from sedac.engine.backends.dense import why_not_dense
from sedac.engine.backends.kinds import KIND_CONTEXTUAL, KIND_WIDTH
from sedac.engine.backends.neurons import ACTIVATIONS, find_activation, sort_neurons
from sedac.engine.vllm.parts import (
    direct_register_custom_op,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from sedac.errors import UnsupportedModel
from sedac.probe.levels import Neurons

_MLPS: dict[str, CudaMlp] = {}
"""MLPs by module name, because operators can carry names, not objects."""


def _device_mlp(x_TD: Tensor, level_T: Tensor, mlp_name: str) -> Tensor:
    return _MLPS[mlp_name].compute(x_TD)


def _device_mlp_fake(x_TD: Tensor, level_T: Tensor, mlp_name: str) -> Tensor:
    return torch.empty_like(x_TD)


# The checkpoint operator writes `level_T`; naming it here orders this operator after it.
direct_register_custom_op("sedac_device_mlp", _device_mlp, fake_impl=_device_mlp_fake)


@functools.cache
def _gated(base: Any) -> type[nn.Module]:
    def forward(self: Any, x_TD: Tensor) -> Tensor:
        """Compute the MLP by the operator, and add up the ranks' parts behind it where that is left to do."""
        out_TD: Tensor = torch.ops.vllm.sedac_device_mlp(x_TD, self.sedac_level_T, self.sedac.name)
        return tensor_model_parallel_all_reduce(out_TD) if self.sedac.sums else out_TD

    return type(f"Gated{base.__name__}", (base,), {"forward": forward, "__module__": base.__module__})


class CudaMlp(GatedMlp):
    """One MLP; see the module's docstring."""

    backend: DeviceBackend

    def __init__(
        self, backend: DeviceBackend, module: Any, name: str, layer: int, source: Neurons | None, *, scores_activation: bool, lora: bool
    ) -> None:
        """Gate the MLP.

        Raises:
            UnsupportedModel: ranks add up their parts in a place that an IF node would hold.
        """
        super().__init__(backend, module, name, layer)
        base: Any = type(module)
        self.sums = False
        """Whether the ranks' parts are added up behind the operator."""
        if get_tensor_model_parallel_world_size() > 1:
            down = getattr(module, "down_proj", None)
            if down is None or not getattr(down, "reduce_results", False):
                raise UnsupportedModel(
                    f"{name} ({base.__name__}) adds up its ranks' parts inside; SEDAC on CUDA needs a down_proj that does: use tensor_parallel_size 1"
                )
            down.reduce_results, self.sums = False, True
        self.device: DeviceMlp | None = None
        """The MLP on the device. It is there after `finish`."""
        self._source, self._scores_activation, self._lora = source, scores_activation, lora
        self._has_own_kernel, self._has_parts = _has_own_kernel(module), has_parts(base)
        _MLPS[name] = self
        self.gate(_gated)

    def compute(self, x_TD: Tensor) -> Tensor:
        """Compute every row at its level, without the sum over ranks."""
        device = self.device
        if not is_capturing() and not self.backend.is_active:
            if device is None:  # its weights are not loaded yet
                return self.base(x_TD)
            if self.backend.num_tokens == 0:
                device.compute(x_TD, always=True)  # a warm-up: what a capture will launch must have been built before it
            return device.compute_plain(x_TD)
        assert device is not None
        return device.compute(x_TD)

    def finish(self) -> None:
        """Say where the loaded weights lie, and lay down's columns out by neuron."""
        module, source, problem = self.module, self._source, why_not_dense(self.module)
        activation = find_activation(getattr(module, "act_fn", None))
        parts = neurons = None
        counts: dict[int, int] = {}
        if not problem and not self._lora and activation is not None and self._has_parts:
            parts = Parts(
                weights=(module.gate_up_proj.weight.data, module.down_proj.weight.data),
                gate_up=functools.partial(_multiply, module, "gate_up_proj"), down=functools.partial(_multiply, module, "down_proj"),
                activation=ACTIVATIONS[activation], own_activation=module.act_fn if self._has_own_kernel else None,
            )  # fmt: skip
        if source is not None:
            if parts is None:
                reason = problem or "computes more than down(act(gate) * up)"
                raise UnsupportedModel(f"{self.name} {reason} and can't take the probe set's reduced levels; offer hard exits only: SEDAC_LEVELS=0")
            neurons, counts = _make_neurons(source, parts.weights[1], scores_activation=self._scores_activation)
        kind_V, parameter_V = self.kind_V, self.parameter_V = self.backend.table.make_row(self.layer, counts, has_neurons=neurons is not None)
        width_V = torch.where(kind_V == KIND_WIDTH, parameter_V, torch.where(kind_V == KIND_CONTEXTUAL, math.inf, 0.0))
        self.device = DeviceMlp(
            backend=self.backend, layer=self.layer, kind_V=kind_V, parameter_V=parameter_V,
            falling_V=width_V.argsort(descending=True, stable=True).int(), base=self.base, parts=parts, neurons=neurons,
        )  # fmt: skip
        self._source = None


def _make_neurons(source: Neurons, down_DF: Tensor, *, scores_activation: bool) -> tuple[DeviceNeurons, dict[int, int]]:
    """Return this rank's share of what calibration knows, on the weights' device, and how many of the leading k are its own, by k."""
    rank, world_size, device = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size(), down_DF.device
    order_F, counts = sort_neurons(source, rank, world_size)
    size = order_F.numel()
    mine = slice(rank * size, (rank + 1) * size)
    place_F = torch.empty_like(order_F)
    place_F[order_F] = torch.arange(size, device=order_F.device)
    natural_F = source.scale_F[mine].float()
    repair_FD = None if source.repair_FD is None else source.repair_FD[mine].to(device, down_DF.dtype)
    neurons = DeviceNeurons(
        order_F=order_F.int().to(device), rank_F=place_F.int().to(device),
        natural_scale_F=natural_F.to(device), scale_F=natural_F[order_F].to(device),
        down_FD=(down_DF.t() if repair_FD is None else repair_FD).contiguous(), repaired=repair_FD is not None, scores_activation=scores_activation,
    )  # fmt: skip
    return neurons, counts


def _multiply(mlp: Any, name: str, x: Tensor) -> Tensor:
    """Multiply by one of the MLP's linear layers as vLLM does, without the sum over ranks."""
    linear = getattr(mlp, name)
    product: Tensor = linear.quant_method.apply(linear, x)
    return product


def _has_own_kernel(mlp: Any) -> bool:
    """Whether vLLM runs its own activation kernel, which rounds twice, and leaves nothing to the compiler; known while vLLM builds the model."""
    enabled = getattr(type(getattr(mlp, "act_fn", None)), "enabled", None)
    return bool(enabled and enabled())


@functools.cache
def has_parts(base: type) -> bool:
    """Return whether an MLP class's forward is down(act(gate_up(x))) and nothing else: it is called once, on stand-ins that note their use."""
    used: list[str] = []

    def stand_in(name: str, *, is_linear: bool) -> Any:
        """Return a stand-in for one part of the module."""

        def call(x: Any) -> Any:
            """Note that the part was called, and return its value."""
            assert x == ("x", *used), "not the value of the step before"
            used.append(name)
            return (("x", *used), None) if is_linear else ("x", *used)

        return call

    module = SimpleNamespace(
        gate_up_proj=stand_in("gate_up", is_linear=True), act_fn=stand_in("act", is_linear=False), down_proj=stand_in("down", is_linear=True)
    )
    try:
        out = vars(base)["forward"](module, ("x",)) if "forward" in vars(base) else base.forward(module, ("x",))  # type: ignore[attr-defined]
    except Exception:  # noqa: BLE001  whatever it does with a tuple, it is more than those three steps
        return False
    return bool(out == ("x", "gate_up", "act", "down"))
