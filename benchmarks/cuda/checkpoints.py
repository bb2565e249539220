"""The checkpoint of the benchmark: a state with probes of a shape's size, its risks against float64, and its time in a graph."""

from __future__ import annotations

from typing import Any

import torch
from cases import Shape, get_shape
from measured import DTYPES, get_device
from mlps import FULL, NEVER, CheckFailed, make_tokens
from replay import Replay, poison_scratch
from sedac.engine.backends.cuda.backend import CudaBackend
from sedac.engine.backends.levels import LevelTable
from sedac.engine.step.state import State
from sedac.policy.layout import Layout
from sedac.policy.model import Checkpoint, Policy
from sedac.probe.probe import LREProbe
from timing import Variant, time_variants
from torch import Tensor
from torch.nn import functional


def make_state(
    shape: Shape, layers: tuple[int, ...], device: torch.device, *, rank: int = 128, threshold: float = NEVER, max_num_tokens: int = 512
) -> State:
    """Return a state with probes after `layers`, whose policy is in force."""
    layout = Layout(
        num_layers=shape.num_layers, hidden_size=shape.hidden_size, checkpoint_layers=layers, probe_set="b", levels=("full", "skip"),
        probe_set_sha256="0" * 64, max_rank=rank,
    )  # fmt: skip
    probes = {layer: LREProbe(shape.hidden_size, rank).requires_grad_(False).to(device) for layer in layers}
    table = LevelTable(shape.num_layers, (), (), shape.num_neurons, device)
    state = State(layout, probes, table, max_num_tokens=max_num_tokens, device=device, make_backend=CudaBackend)
    state.apply(Policy(enabled=True, checkpoints=tuple(Checkpoint(layer=layer, threshold=threshold) for layer in layers)), 1)
    return state


def begin(state: State, num_tokens: int) -> None:
    """Start a step whose tokens are all decided about."""
    if state.num_tokens:
        state.end_step()
    state.begin_step(num_tokens, make_tokens([FULL] * num_tokens))


def get_risk(state: State, index: int, hidden_TD: Tensor, residual_TD: Tensor) -> Tensor:
    """Return a probe's risks (T,) in float64."""
    probe = state.stable.probes[index].probe
    assert probe is not None
    w = {name: tensor.double() for name, tensor in probe.state_dict().items()}
    z_TR = (hidden_TD.double() + residual_TD.double()) @ w["down.weight"].t()
    z_TR = functional.layer_norm(z_TR, z_TR.shape[1:], w["norm.weight"], w["norm.bias"])
    return functional.softplus(z_TR @ w["out.weight"][0] + w["out.bias"])


def run_row(spec: dict[str, Any], context: dict[str, Any]) -> dict[str, Any]:
    """Check the risks of one checkpoint and time as many as a model may have.

    Raises:
        CheckFailed: an error passes 1e-4, or a risk was not written.
    """
    shape, device = get_shape(spec["shape"], is_tiny=context["is_check"]), get_device(context)
    dtype, num_tokens = DTYPES[spec["dtype"]], spec["tokens"]
    row: dict[str, Any] = {"error": check(shape, num_tokens, dtype, device, captures=context["captures"])}
    layers = tuple(range(min(16, shape.num_layers - 1)))
    state = make_state(shape, layers, device, rank=_get_rank(device))
    streams = [torch.randn(num_tokens, shape.hidden_size, device=device).to(dtype) for _ in layers]

    def run() -> tuple[Tensor, ...]:
        for layer, stream_TD in zip(layers, streams, strict=True):
            state.observe(layer, stream_TD)
        return ()

    variant = Variant(run=run, begin=lambda: begin(state, num_tokens))
    time = time_variants({"ours": variant}, captures=context["captures"], num_rounds=context["rounds"], is_dry=context["is_check"])["ours"]
    return row if context["is_check"] else row | time.per(len(layers)).show("ours")


def check(shape: Shape, num_tokens: int, dtype: torch.dtype, device: torch.device, *, captures: bool) -> float:
    """Return the largest relative error of a risk.

    Raises:
        CheckFailed: it passes 1e-4, or a risk was not written.
    """
    state = make_state(shape, (0,), device, rank=_get_rank(device))
    hidden_TD, residual_TD = (torch.randn(num_tokens, shape.hidden_size, device=device).to(dtype) for _ in range(2))

    def run() -> tuple[Tensor, ...]:
        state.observe(0, hidden_TD, residual_TD)
        return ()

    replay = Replay(run, captures=captures)
    poison_scratch(state)
    begin(state, num_tokens)
    replay.run_poisoned()
    expected_T = get_risk(state, 0, hidden_TD, residual_TD)
    error_T = (state.buffers.risk_CT[0, :num_tokens].double() - expected_T).abs() / expected_T
    if not bool((error_T < 1e-4).all()):  # false for NaN too
        raise CheckFailed(f"{shape.name}, {num_tokens} tokens, probe, {dtype}: errors {error_T.tolist()} pass 1e-4")
    return float(error_T.max())


def _get_rank(device: torch.device) -> int:
    return 16 if device.type == "cpu" else 128
