"""The gated MLP of a model on a GPU: one opaque operator per MLP that a CUDA graph captures with every form's launches.

`attach` swaps the MLP's class when the model is built, `finish` reads its weights once they are loaded; engine/backends/mlp.py calls both
where the state decides on the device. Under tensor parallelism the sum over ranks comes after the operator, outside all IF nodes.
T tokens, D hidden size, F neurons of this rank, V levels.
"""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sedac.engine.backends.cuda.guard import is_capturing
from sedac.engine.backends.cuda.mlp import DeviceMlp, DeviceNeurons, Parts
from sedac.engine.backends.levels import ACTIVATIONS, KIND_CONTEXTUAL, KIND_FULL, KIND_SKIP, KIND_WIDTH, find_activation, sort_neurons
from sedac.engine.step.state import State
from sedac.engine.vllm.parts import (
    direct_register_custom_op,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from sedac.errors import UnsupportedModel
from sedac.probe.levels import Neurons

_MLPS: dict[str, Any] = {}
"""by module name; operators can carry names, not objects"""


def _device_mlp(x_TD: Tensor, level_T: Tensor, mlp_name: str) -> Tensor:
    mlp = _MLPS[mlp_name]
    state: State = mlp.sedac_state
    if not is_capturing() and not state.is_active:
        if mlp.sedac_device is None:  # its weights are not loaded yet
            out_TD: Tensor = mlp.sedac_base(x_TD)
            return out_TD
        if state.num_tokens == 0:
            mlp.sedac_device.compute(x_TD, always=True)  # a warm-up: what a capture will launch must have been built before it
        return mlp.sedac_device.compute_plain(x_TD)
    return mlp.sedac_device.compute(x_TD)


def _device_mlp_fake(x_TD: Tensor, level_T: Tensor, mlp_name: str) -> Tensor:
    return torch.empty_like(x_TD)


# The checkpoint operator writes `level_T`; naming it here orders this operator after it.
direct_register_custom_op("sedac_device_mlp", _device_mlp, fake_impl=_device_mlp_fake)


@functools.cache
def _gated(base: Any) -> type[nn.Module]:
    def forward(self: Any, x_TD: Tensor) -> Tensor:
        out_TD: Tensor = torch.ops.vllm.sedac_device_mlp(x_TD, self.sedac_level_T, self.sedac_name)
        return tensor_model_parallel_all_reduce(out_TD) if self.sedac_sums else out_TD

    return type(f"Gated{base.__name__}", (base,), {"forward": forward, "__module__": base.__module__})


def attach(mlp: Any, name: str, layer: int, state: State, neurons: Neurons | None, *, scores_activation: bool, lora: bool) -> None:
    """Gate the MLP of decoder layer `layer`, called `name` in the model; `neurons` where the probe set has reduced levels.

    Raises:
        UnsupportedModel: ranks add up their parts in a place that an IF node would hold.
    """
    base: Any = type(mlp)
    mlp.sedac_sums = False
    if get_tensor_model_parallel_world_size() > 1:
        down = getattr(mlp, "down_proj", None)
        if down is None or not getattr(down, "reduce_results", False):
            raise UnsupportedModel(
                f"{name} ({base.__name__}) adds up its ranks' parts inside; SEDAC on CUDA needs a down_proj that does: use tensor_parallel_size 1"
            )
        down.reduce_results, mlp.sedac_sums = False, True
    _MLPS[name] = mlp
    mlp.sedac_name, mlp.sedac_layer, mlp.sedac_state = name, layer, state
    mlp.register_buffer("sedac_level_T", state.level_T, persistent=False)
    mlp.sedac_native, mlp.sedac_handlers, mlp.sedac_lora, mlp.sedac_device = False, {}, lora, None
    mlp.sedac_source, mlp.sedac_scores_activation = neurons, scores_activation
    mlp.sedac_has_own_kernel, mlp.sedac_has_parts = _has_own_kernel(mlp), has_parts(base)
    mlp.sedac_base = functools.partial(base.forward, mlp)
    mlp.__class__ = _gated(base)


def finish(mlp: Any, problem: str) -> None:
    """After the weights are loaded: say where they lie, and lay down's columns out by neuron; `problem`: why its weights can't be read."""
    state: State = mlp.sedac_state
    device_forms, layer = state.device_forms, mlp.sedac_layer
    assert device_forms is not None
    source: Neurons | None = mlp.sedac_source
    kind_V, parameter_V = state.table.kind_LV[layer].clone(), state.table.parameter_LV[layer].clone()
    activation = find_activation(getattr(mlp, "act_fn", None))
    parts = neurons = None
    if not problem and not mlp.sedac_lora and activation is not None and mlp.sedac_has_parts:
        parts = Parts(
            weights=(mlp.gate_up_proj.weight.data, mlp.down_proj.weight.data),
            gate_up=functools.partial(_multiply, mlp, "gate_up_proj"), down=functools.partial(_multiply, mlp, "down_proj"),
            activation=ACTIVATIONS[activation], own_activation=mlp.act_fn if mlp.sedac_has_own_kernel else None,
        )  # fmt: skip
    if source is None:
        kind_V[kind_V > KIND_SKIP] = KIND_FULL
    else:
        if parts is None:
            reason = problem or "computes more than down(act(gate) * up)"
            raise UnsupportedModel(f"{mlp.sedac_name} {reason} and can't take the probe set's reduced levels; offer hard exits only: SEDAC_LEVELS=0")
        neurons, counts = _make_neurons(source, parts.weights[1], scores_activation=mlp.sedac_scores_activation)
        for i in (kind_V == KIND_WIDTH).nonzero().flatten().tolist() if counts else ():
            parameter_V[i] = counts[int(parameter_V[i])]
    width_V = torch.where(kind_V == KIND_WIDTH, parameter_V, torch.where(kind_V == KIND_CONTEXTUAL, math.inf, 0.0))
    mlp.sedac_device = DeviceMlp(
        device=device_forms, layer=layer, kind_V=kind_V, parameter_V=parameter_V, falling_V=width_V.argsort(descending=True, stable=True).int(),
        base=mlp.sedac_base, parts=parts, neurons=neurons,
    )  # fmt: skip
    mlp.sedac_source = None


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
        def call(x: Any) -> Any:
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
