"""The checkpoint of the benchmark: a state with probes of a shape's size, its risks against float64, and its time in a graph."""

from __future__ import annotations

import numpy as np
import torch
from cases import Shape
from sedac.engine.levels import LevelTable
from sedac.engine.state import State
from sedac.engine.tokens import DECIDES, Tokens
from sedac.policy import Checkpoint, Layout, Policy
from sedac.probe.probe import LREProbe
from torch import Tensor
from torch.nn import functional

NEVER = 1e-30
"""a threshold that decides about every token and makes none confident, so that each checkpoint of a pass does all its work"""


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
    state = State(layout, probes, table, max_num_tokens=max_num_tokens, device=device, allow_native=False)
    if state.device_forms is None:
        state.use_device_forms()
    state.apply(Policy(enabled=True, checkpoints=tuple(Checkpoint(layer=layer, threshold=threshold) for layer in layers)), 1)
    return state


def begin(state: State, num_tokens: int) -> None:
    """Start a step whose tokens are all decided about."""
    if state.is_active:
        state.end_step()
    ones = np.ones(num_tokens)
    tokens = Tokens(
        role_T=(ones * DECIDES).astype(np.uint8), floor_T=(ones * 0).astype(np.uint8), goal_T=ones.astype(np.uint8),
        scale_T=ones.astype(np.float32), tier_T=(ones * 0).astype(np.int64),
    )  # fmt: skip
    state.begin_step(num_tokens, tokens)


def get_risk(state: State, index: int, hidden_TD: Tensor, residual_TD: Tensor) -> Tensor:
    """Return a probe's risks (T,) in float64."""
    probe = state.stable.probes[index].probe
    assert probe is not None
    w = {name: tensor.double() for name, tensor in probe.state_dict().items()}
    z_TR = (hidden_TD.double() + residual_TD.double()) @ w["down.weight"].t()
    z_TR = functional.layer_norm(z_TR, z_TR.shape[1:], w["norm.weight"], w["norm.bias"])
    return functional.softplus(z_TR @ w["out.weight"][0] + w["out.bias"])


def check_probe(shape: Shape, num_tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the largest relative error of a risk.

    Raises:
        SystemExit: it passes 1e-4, or a risk was not written.
    """
    state = make_state(shape, (0,), device, rank=16 if device.type == "cpu" else 128)
    begin(state, num_tokens)
    hidden_TD, residual_TD = (torch.randn(num_tokens, shape.hidden_size, device=device).to(dtype) for _ in range(2))
    state.observe(0, hidden_TD, residual_TD)
    expected_T = get_risk(state, 0, hidden_TD, residual_TD)
    error_T = (state.buffers.risk_CT[0, :num_tokens].double() - expected_T).abs() / expected_T
    if not bool((error_T < 1e-4).all()):  # false for NaN too
        raise SystemExit(f"{shape.name}, {num_tokens} tokens, probe, {dtype}: errors {error_T.tolist()} pass 1e-4")
    return float(error_T.max())


def measure_probe(shape: Shape, num_tokens: int, dtype: torch.dtype, device: torch.device, *, num_rounds: int) -> float:
    """Return seconds per checkpoint, over as many probes as the model may have checkpoints."""
    from timing import capture, time_graphs

    layers = tuple(range(min(16, shape.num_layers - 1)))
    state = make_state(shape, layers, device)
    begin(state, num_tokens)
    streams = [torch.randn(num_tokens, shape.hidden_size, device=device) for _ in layers]

    def run() -> None:
        for layer, stream_TD in zip(layers, streams, strict=True):
            state.observe(layer, stream_TD)

    return time_graphs({"ours": capture(run)}, num_rounds=num_rounds)["ours"] / len(layers)
