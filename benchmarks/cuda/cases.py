"""Random MLPs of real models' shapes on the device forms, what each case asks of them, and what it would ideally cost.

T tokens, D hidden size, F neurons of a rank. Bytes and FLOPs are of one MLP; an ideal is the dense time, shortened as the longer of
reading and computing gets shorter (a roofline with the data sheet's peaks, which only weigh the two against each other).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from sedac.engine.cuda import forms
from sedac.engine.cuda.mlp import DeviceMlp, DeviceNeurons
from sedac.engine.cuda.rows import activation_kernel
from sedac.engine.levels import KIND_CONTEXTUAL, KIND_WIDTH, LevelTable
from sedac.engine.state import State
from sedac.engine.tokens import DECIDES, Tokens
from sedac.policy import Layout, Policy
from sedac.probe.levels import Level
from torch import Tensor
from torch.nn import functional

FULL, SKIP, CONTEXTUAL, WIDTH = 0, 1, 2, 3
"""levels by index in every table made here"""
PEAK_BYTES, PEAK_FLOPS = 4.8e12, 990e12
"""per second; H200 data sheet, bf16 dense"""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One model's MLP (of one rank) and what surrounds it."""

    name: str
    hidden_size: int
    num_neurons: int
    num_layers: int
    num_heads: int = 0
    num_kv_heads: int = 0
    head_size: int = 128


SHAPES = (
    Shape(name="Qwen2.5-0.5B", hidden_size=896, num_neurons=4864, num_layers=24, num_heads=14, num_kv_heads=2, head_size=64),
    Shape(name="Qwen2.5-3B", hidden_size=2048, num_neurons=11008, num_layers=36, num_heads=16, num_kv_heads=2),
    Shape(name="Qwen2.5-7B", hidden_size=3584, num_neurons=18944, num_layers=28, num_heads=28, num_kv_heads=4),
    Shape(name="Qwen2.5-14B", hidden_size=5120, num_neurons=13824, num_layers=48, num_heads=40, num_kv_heads=8),
    Shape(name="Qwen2.5-32B", hidden_size=5120, num_neurons=27648, num_layers=64, num_heads=40, num_kv_heads=8),
    Shape(name="Llama-3-70B/TP8", hidden_size=8192, num_neurons=3584, num_layers=80, num_heads=8, num_kv_heads=1),
)
TINY = (Shape(name="tiny", hidden_size=72, num_neurons=200, num_layers=3, num_heads=4, num_kv_heads=2, head_size=16),)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What the rows of a step get."""

    name: str
    level: int
    rows: float = 1.0
    """share of the rows that get the level; the others are full"""
    active: float = 1.0
    """share of the neurons that a contextual or ordered row keeps"""

    def get_levels(self, num_tokens: int) -> list[int]:
        """Return the levels of the rows, the reduced ones spread evenly."""
        reduced = round(num_tokens * self.rows)
        return [self.level if (t * reduced) // num_tokens != ((t + 1) * reduced) // num_tokens else FULL for t in range(num_tokens)]

    def get_ideal(self, shape: Shape, num_tokens: int) -> float:
        """Return what the case ideally costs as a share of the dense MLP's time."""
        num_reduced = sum(level != FULL for level in self.get_levels(num_tokens))
        num_full = num_tokens - num_reduced
        union = 1 - (1 - self.active) ** num_reduced  # rows choose independently
        read = {SKIP: 0.0, WIDTH: self.active, CONTEXTUAL: (1 + 2 * union) / 3, FULL: 1.0}[self.level]
        work = {SKIP: 0.0, WIDTH: self.active, CONTEXTUAL: (1 + 2 * self.active) / 3, FULL: 1.0}[self.level]
        weights = 3 * shape.hidden_size * shape.num_neurons
        reading, computing = 2 * weights / PEAK_BYTES, 2 * weights * num_tokens / PEAK_FLOPS
        ours = max(reading * (1.0 if num_full else read), computing * (num_full + num_reduced * work) / num_tokens)
        return ours / max(reading, computing)


CASES = (
    Case(name="nothing reduced", level=FULL),
    *(Case(name=f"skip, {round(100 * r)} % of rows", level=SKIP, rows=r) for r in (0.25, 0.5, 0.75, 1.0)),
    *(Case(name=f"contextual, {round(100 * a)} % active", level=CONTEXTUAL, active=a) for a in (0.25, 0.5, 0.75)),
    *(Case(name=f"width, {round(100 * a)} %", level=WIDTH, active=a) for a in (0.25, 0.5)),
    Case(name="width 50 %, half the rows", level=WIDTH, rows=0.5, active=0.5),
)


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
        layout = Layout(num_layers=count, hidden_size=hidden_size, checkpoint_layers=(), probe_set="b", levels=self.table.names)
        self.state = State(layout, {}, self.table, max_num_tokens=max_num_tokens, device=device, allow_native=False)
        if self.state.device_forms is None:
            self.state.use_device_forms()
        self.state.apply(Policy(enabled=True), 1)
        self.mlps: list[DeviceMlp] = []

    def prepare(self, case: Case, x_TD: Tensor, form: int | None = None) -> None:
        """Make the MLPs for a case: thresholds by which the wanted share of these rows' neurons is active, and a step that asks for it."""
        forms_of = self.state.device_forms
        assert forms_of is not None
        size, device = self.shape.num_neurons, self.device
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(size, device=device)
        ones = torch.ones(size, device=device)
        self.mlps = []
        for layer, (gate_up, down, down_neurons) in enumerate(self.weights):
            gate = functional.linear(x_TD[: min(len(x_TD), 16)], gate_up[:size]).abs().float().flatten()
            kind, parameter = self.table.kind_LV[layer], self.table.parameter_LV[layer].clone()
            keep = max(1, min(gate.numel() - 1, round(case.active * gate.numel())))
            around = gate.sort(descending=True).values[keep - 1 : keep + 1]
            parameter[CONTEXTUAL], parameter[WIDTH] = around.mean(), round(case.active * size)  # between two scores, so that none lies on it
            neurons = DeviceNeurons(
                order_F=self.order.int(), rank_F=place.int(), natural_scale_F=ones, scale_F=ones, down_FD=down_neurons,
                repaired=self.repaired, scores_activation=False,
            )  # fmt: skip
            width = torch.where(kind == KIND_WIDTH, parameter, torch.where(kind == KIND_CONTEXTUAL, math.inf, 0.0))
            self.mlps.append(
                DeviceMlp(
                    device=forms_of, layer=layer, kind_V=kind, parameter_V=parameter, falling_V=width.argsort(descending=True, stable=True).int(),
                    base=functools.partial(run_dense, gate_up=gate_up, down=down), gate_up=functools.partial(functional.linear, weight=gate_up),
                    down=functools.partial(functional.linear, weight=down), weights=(gate_up, down), neurons=neurons, activation=0, form=form,
                )
            )  # fmt: skip
        self.begin(case.get_levels(len(x_TD)))

    def begin(self, levels: list[int]) -> None:
        """Start a step whose rows have these levels; the one that runs ends."""
        if self.state.is_active:
            self.state.end_step()
        count = len(levels)
        floor, role = np.array(levels, dtype=np.uint8), np.full(count, DECIDES, dtype=np.uint8)
        tokens = Tokens(role_T=role, floor_T=floor, goal_T=floor, scale_T=np.ones(count, dtype=np.float32), tier_T=np.zeros(count, dtype=np.int64))
        self.state.begin_step(count, tokens)
        if not self.state.is_active:  # nothing to reduce: an active step all the same, as an engine with checkpoints has
            self.state.buffers.write(tokens, count, is_new=True)
            assert self.state.device_forms is not None
            self.state.device_forms.begin(count, is_active=True)
            self.state.is_active = True

    def expect(self, layer: int, x_TD: Tensor, levels: list[int]) -> tuple[Tensor, Tensor]:
        """Return the output (T, D) in float64, and (T,) how far a row may be off because a score lies on the threshold."""
        gate_up, down, down_neurons = (w.double() for w in self.weights[layer])
        size, mlp = self.shape.num_neurons, self.mlps[layer]
        product = functional.linear(x_TD.double(), gate_up)
        gate, h = product[:, :size], functional.silu(product[:, :size]) * product[:, size:]
        level_T = torch.tensor(levels, device=self.device)
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


def run_dense(x_TD: Tensor, *, gate_up: Tensor, down: Tensor) -> Tensor:
    """The MLP as a model without SEDAC has it: two matrix products of the vendor's library, one launch for the activation between."""
    product_TF = functional.linear(x_TD, gate_up)
    (num_rows, width), block = product_TF.shape, 1024
    h_TF = product_TF.new_empty((num_rows, width // 2))
    none, zero = _make_idle(product_TF.device)
    activation_kernel[(num_rows, -(-width // 2 // block))](
        product_TF, h_TF, none, zero, none, none, none, zero, zero, width // 2, product_TF.stride(0),
        ACTIVATION=0, SCORES_ACTIVATION=False, ROUNDS_TWICE=False, BLOCK_F=block,
    )  # fmt: skip
    return functional.linear(h_TF, down)


@functools.cache
def _make_idle(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return levels of a step of no tokens, by which the activation kernel masks nothing."""
    return torch.zeros(16, dtype=torch.int32, device=device), torch.zeros(16, device=device)


def get_form_name(form: int) -> str:
    """Return a form's name in the tables."""
    return forms.NAMES[form]
