"""Random MLPs of a real model's shape on the device forms, and what they must give, in float64.

T tokens, D hidden size, F neurons of a rank, V levels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from cases import CONTEXTUAL, FULL, SKIP, WIDTH, Case, Shape
from sedac.engine.backends.cuda.backend import CudaBackend
from sedac.engine.backends.cuda.mlp import DeviceMlp, DeviceNeurons, Parts
from sedac.engine.backends.kinds import KIND_CONTEXTUAL, KIND_FULL, KIND_SKIP, KIND_WIDTH
from sedac.engine.backends.levels import LevelTable
from sedac.engine.backends.tokens import DECIDES, Tokens
from sedac.engine.step.state import State
from sedac.policy.layout import Layout
from sedac.policy.model import Checkpoint, Policy
from sedac.probe.levels import Level
from sedac.probe.probe import LREProbe
from torch import Tensor
from torch.nn import functional

BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""relative error of a row against float64"""
NEVER = 1e-30
"""a threshold that decides about every token and makes none confident, so that each checkpoint of a pass does all its work"""


MLPS = ("levels", "plain", "other", "own", "repaired")
"""what an MLP is: with neuron levels; without; a module of another make, which is full or skipped; with levels and an activation kernel of
the model's own, which rounds in between; with levels whose down projection is repaired (this one is asked for when weights are made)"""


class CheckFailed(Exception):
    """A result is wrong, or holds what was never written; says where."""


def make_tokens(levels: Sequence[int], *, goal: int = SKIP, promised: bool = False) -> Tokens:
    """Return a step's tokens, whose levels are their floors; `promised`: those at level `full` get the module's own result."""
    count, floor_T = len(levels), np.array(levels, dtype=np.uint8)
    return Tokens(
        role_T=np.where(promised & (floor_T == FULL), 0, DECIDES).astype(np.uint8), floor_T=floor_T, goal_T=np.full(count, goal, dtype=np.uint8),
        scale_T=np.ones(count, dtype=np.float32), tier_T=np.zeros(count, dtype=np.int64),
    )  # fmt: skip


def restart(state: State, floor_T: Tensor) -> None:
    """Put the step that runs back to its start, `floor_T` its first levels, inside a graph too: there a replay goes on where the last ended."""
    assert isinstance(state.backend, CudaBackend)
    state.level_T[: len(floor_T)].copy_(floor_T)
    state.buffers.done_T.zero_()
    state.backend.launch_begin(len(floor_T), is_active=True)


class Mlps:
    """So many MLPs of one shape behind one state, each with weights of its own, so that together they pass the L2."""

    def __init__(
        self, shape: Shape, count: int, dtype: torch.dtype, device: torch.device, *, repaired: bool = False, max_num_tokens: int = 512
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        size, hidden_size = shape.num_neurons, shape.hidden_size
        self.weights = []
        for _ in range(count):
            gate_up = (torch.randn(2 * size, hidden_size, device=device) / hidden_size**0.5).to(dtype)
            down = (torch.randn(hidden_size, size, device=device) / size**0.5).to(dtype)
            self.weights.append((gate_up, down, (down.t() * (1.1 if repaired else 1.0)).contiguous()))
        self.repaired, self.order = repaired, torch.randperm(size, device=device)
        levels = (
            Level(name="contextual", reduction="contextual", parameters_L=torch.full((count,), 0.5)),
            Level(name="width", reduction="width", parameters_L=torch.full((count,), size // 2, dtype=torch.int32)),
        )
        self.table = LevelTable(count, levels, (0.4, 0.5), size, device)
        # A checkpoint that nothing observes keeps steps active in which no row is reduced, as in an engine with checkpoints.
        layout = Layout(
            num_layers=count, hidden_size=hidden_size, checkpoint_layers=(0,), probe_set="b", probe_set_sha256="0" * 64,
            levels=self.table.names, max_rank=8,
        )  # fmt: skip
        probe = LREProbe(hidden_size, 8).requires_grad_(False).to(device)
        self.state = State(layout, {0: probe}, self.table, max_num_tokens=max_num_tokens, device=device, make_backend=CudaBackend)
        self.state.apply(Policy(enabled=True, checkpoints=(Checkpoint(layer=0, threshold=NEVER),)), 1)
        self.mlps: list[DeviceMlp] = []

    def prepare(self, case: Case, x_NTD: Sequence[Tensor], form: int | None = None, *, kind: str = "levels") -> None:
        """Make the MLPs for a case, with thresholds by which the wanted share of their inputs' neurons is active; no step runs afterwards.

        `kind`: of MLPS; without neuron levels a row at one of them is full.
        """
        self.end()
        backend = self.state.backend
        assert isinstance(backend, CudaBackend)
        size, device = self.shape.num_neurons, self.device
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(size, device=device)
        ones = torch.ones(size, device=device)
        self.mlps = []
        for layer, ((gate_up, down, down_neurons), x_TD) in enumerate(zip(self.weights, x_NTD, strict=True)):
            kind_V, parameter_V = self.table.kind_LV[layer].clone(), self.table.parameter_LV[layer].clone()
            parameter_V[CONTEXTUAL], parameter_V[WIDTH] = self.find_threshold(layer, x_TD, case.active), round(case.active * size)
            neurons: DeviceNeurons | None = DeviceNeurons(
                order_F=self.order.int(), rank_F=place.int(), natural_scale_F=ones, scale_F=ones, down_FD=down_neurons,
                repaired=self.repaired, scores_activation=False,
            )  # fmt: skip
            if kind in ("plain", "other"):
                neurons = None
                kind_V[kind_V > KIND_SKIP] = KIND_FULL
            parts = Parts(
                weights=(gate_up, down), gate_up=functools.partial(multiply, weight=gate_up),
                down=functools.partial(multiply, weight=down), activation=0, own_activation=activate_in_two if kind == "own" else None,
            )  # fmt: skip
            width_V = torch.where(kind_V == KIND_WIDTH, parameter_V, torch.where(kind_V == KIND_CONTEXTUAL, math.inf, 0.0))
            self.mlps.append(
                DeviceMlp(
                    backend=backend, layer=layer, kind_V=kind_V, parameter_V=parameter_V,
                    falling_V=width_V.argsort(descending=True, stable=True).int(), base=functools.partial(run_dense, gate_up=gate_up, down=down),
                    parts=None if kind == "other" else parts, neurons=neurons, form=form,
                )
            )  # fmt: skip

    def find_threshold(self, layer: int, x_TD: Tensor, share: float) -> Tensor:
        """Return the threshold that so many of the gates of the first rows of x (T, D) pass: between two of them, so that none lies on it."""
        gate = functional.linear(x_TD[:16], self.weights[layer][0][: self.shape.num_neurons]).abs().float().flatten()
        keep = max(1, min(gate.numel() - 1, round(share * gate.numel())))
        return gate.sort(descending=True).values[keep - 1 : keep + 1].mean()

    def begin(self, levels: Sequence[int], *, promised: bool = False) -> None:
        """Start a step whose rows have these levels; the one that runs ends."""
        self.end()
        self.state.begin_step(len(levels), make_tokens(levels, promised=promised))

    def end(self) -> None:
        """End the step that runs, if any."""
        if self.state.num_tokens:
            self.state.end_step()

    def expect(self, layer: int, x_TD: Tensor, levels: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the output (T, D) in float64, and (T,) how far a row may be off because a score lies on the threshold."""
        gate_up, down, down_neurons = (w.double() for w in self.weights[layer])
        size, mlp = self.shape.num_neurons, self.mlps[layer]
        product = functional.linear(x_TD.double(), gate_up)
        gate, h = product[:, :size], functional.silu(product[:, :size]) * product[:, size:]
        level_T = torch.tensor(levels, device=self.device)
        level_T = torch.where(mlp.kind_V[level_T] == KIND_FULL, FULL, level_T)
        keep = torch.ones_like(h, dtype=torch.bool)
        keep[level_T == SKIP] = False
        keep[level_T == WIDTH] = torch.zeros(size, dtype=torch.bool, device=self.device).index_fill(
            0, self.order[: int(mlp.parameter_V[WIDTH])], True
        )
        limit = float(mlp.parameter_V[CONTEXTUAL])
        is_contextual = (level_T == CONTEXTUAL)[:, None]
        keep &= ~is_contextual | (gate.abs() >= limit)
        near = is_contextual & ((gate.abs() - limit).abs() <= (2.0**-7 if self.dtype != torch.float32 else 1e-6) * limit)
        full, reduced = (h * keep) @ down.t(), (h * keep) @ down_neurons
        slack = 2 * (h * near).norm(dim=1) * float(down_neurons.norm()) / size**0.5
        return torch.where((level_T == FULL)[:, None], full, reduced), slack

    def check(self, layer: int, x_TD: Tensor, levels: Sequence[int], out_TD: Tensor, where: str) -> float:
        """Hold the live rows of an output (T, D) against float64; return the largest relative error of a row.

        Raises:
            CheckFailed: a row is wrong, or holds what was never written.
        """
        live = len(levels)
        expected_TD, slack_T = self.expect(layer, x_TD[:live], levels)
        distance_T, norm_T = (out_TD[:live].double() - expected_TD).norm(dim=1), expected_TD.norm(dim=1).clamp(min=1e-6)
        bad_T = ~(distance_T <= BOUNDS[self.dtype] * norm_T + slack_T)  # true for NaN
        if bool(bad_T.any()):
            first = int(bad_T.nonzero()[0])
            raise CheckFailed(
                f"{where}, MLP {layer}: {int(bad_T.sum())} of {live} rows are wrong, the first is row {first} at level {levels[first]}, "
                f"relative error {float(distance_T[first] / norm_T[first]):.2e}, bound {BOUNDS[self.dtype]:g}"
            )
        return float(((distance_T - slack_T).clamp(min=0) / norm_T).max())


def multiply(x_TD: Tensor, weight: Tensor) -> Tensor:
    """Return x (T, D) times the transposed weight, by the vendor's library.

    In fp32 on a CPU: oneDNN's bf16 product on AMX reads past the end of a row whose length is no multiple of 32, so that NaN in the row
    after it, which stands for padding here, comes through.
    """
    if x_TD.device.type == "cpu":
        return functional.linear(x_TD.float(), weight.float()).to(x_TD.dtype)
    return functional.linear(x_TD, weight)


def run_dense(x_TD: Tensor, *, gate_up: Tensor, down: Tensor) -> Tensor:
    """The MLP as a model without SEDAC has it: two matrix products of the vendor's library, one launch for the activation between."""
    product_TF = multiply(x_TD, gate_up)
    num_rows, size, block = product_TF.shape[0], product_TF.shape[1] // 2, 1024
    h_TF = product_TF.new_empty((num_rows, size))
    silu_kernel[(num_rows, -(-size // block))](product_TF, h_TF, size, product_TF.stride(0), BLOCK_F=block)
    return multiply(h_TF, down)


def activate_in_two(product_TF: Tensor) -> Tensor:
    """Return silu(gate) * up (T, F) of the products (T, 2F), rounded after either: as a kernel of the model's own does."""
    gate_TF, up_TF = product_TF.chunk(2, dim=-1)
    return functional.silu(gate_TF) * up_TF


@triton.jit
def silu_kernel(product_ptr, h_ptr, F, stride, BLOCK_F: tl.constexpr):
    """Write h (T, F) = silu(gate) * up of the products (T, 2F), rounded once; grid: (rows, blocks of F)."""
    f_F = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    row_ptr = product_ptr + tl.program_id(0).to(tl.int64) * stride + f_F
    gate_F = tl.load(row_ptr, mask=f_F < F, other=0.0).to(tl.float32)
    up_F = tl.load(row_ptr + F, mask=f_F < F, other=0.0).to(tl.float32)
    h_F = gate_F * tl.sigmoid(gate_F) * up_F
    tl.store(h_ptr + tl.program_id(0).to(tl.int64) * F + f_F, h_F.to(h_ptr.dtype.element_ty), mask=f_F < F)
