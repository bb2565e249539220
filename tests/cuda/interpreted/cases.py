"""A random MLP with its levels on the device's forms, and what each row of it must be."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from sedac.engine.backends.cuda.backend import CudaBackend
from sedac.engine.backends.cuda.mlp import DeviceMlp, DeviceNeurons, Parts
from sedac.engine.backends.kinds import KIND_CONTEXTUAL, KIND_FULL, KIND_SKIP, KIND_WIDTH
from sedac.engine.backends.levels import LevelTable
from sedac.engine.backends.neurons import ACTIVATIONS
from sedac.engine.backends.tokens import DECIDES, Tokens
from sedac.engine.step.state import State
from sedac.policy.layout import Layout
from sedac.policy.model import Policy
from sedac.probe.levels import Level, activate
from torch.nn import functional

CPU = torch.device("cpu")
D, F, LAYERS = 40, 150, 2
LEVELS = (
    Level(name="contextual-20", reduction="contextual", parameters_L=torch.tensor([0.05, 0.0])),
    Level(name="width-30", reduction="width", parameters_L=torch.tensor([112, F], dtype=torch.int32)),
    Level(name="contextual-50", reduction="contextual", parameters_L=torch.tensor([0.4, math.inf])),
    Level(name="width-60", reduction="width", parameters_L=torch.tensor([61, 0], dtype=torch.int32)),
)

BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class Case:
    """One random MLP and its levels on the device forms."""

    def __init__(
        self,
        dtype: torch.dtype,
        *,
        seed: int = 0,
        activation: str = "silu",
        scores_activation: bool = False,
        repaired: bool = False,
        own_activation: bool = False,
    ) -> None:
        torch.manual_seed(seed)
        self.dtype, self.activation, self.scores_activation, self.own_activation = dtype, activation, scores_activation, own_activation
        self.gate_up = (torch.randn(2 * F, D) * 0.2).to(dtype)
        self.down = (torch.randn(D, F) * 0.2).to(dtype)
        self.order, self.scale = torch.randperm(F), torch.rand(F)
        self.neuron_down = (self.down.T * (1.1 if repaired else 1)).to(dtype).contiguous()
        layout = Layout(num_layers=LAYERS, hidden_size=D, checkpoint_layers=(), probe_set="t", levels=("full", "skip", *(x.name for x in LEVELS)))
        self.table = LevelTable(LAYERS, LEVELS, (0.2, 0.3, 0.5, 0.6), F, CPU)
        self.state = State(layout, {}, self.table, max_num_tokens=256, device=CPU, make_backend=CudaBackend)
        self.state.apply(Policy(enabled=True), 1)
        rank = torch.empty(F, dtype=torch.int32)
        rank[self.order] = torch.arange(F, dtype=torch.int32)
        self.neurons = DeviceNeurons(
            order_F=self.order.int(), rank_F=rank, natural_scale_F=self.scale, scale_F=self.scale[self.order], down_FD=self.neuron_down,
            repaired=repaired, scores_activation=scores_activation,
        )  # fmt: skip

    def make(self, layer: int, form: int | None, *, has_neurons: bool = True, is_known: bool = True) -> DeviceMlp:
        kind_V, parameter_V = self.table.kind_LV[layer], self.table.parameter_LV[layer]
        falling = torch.where(kind_V == KIND_WIDTH, parameter_V, torch.where(kind_V == KIND_CONTEXTUAL, math.inf, 0)).argsort(
            descending=True, stable=True
        )
        parts = Parts(
            weights=(self.gate_up, self.down), gate_up=functools.partial(functional.linear, weight=self.gate_up),
            down=functools.partial(functional.linear, weight=self.down), activation=ACTIVATIONS[self.activation],
            own_activation=self.activate_twice_rounded if self.own_activation else None,
        )  # fmt: skip
        return DeviceMlp(
            backend=self.state.backend, layer=layer, kind_V=kind_V, parameter_V=parameter_V, falling_V=falling.int(), base=self.plain,
            parts=parts if is_known else None, neurons=self.neurons if has_neurons else None, form=form,
        )  # fmt: skip

    def activate_twice_rounded(self, gate_up: torch.Tensor) -> torch.Tensor:
        """As vLLM's own kernel does (csrc/activation_kernels.cu): the activation is rounded before up takes part."""
        return activate(gate_up[:, :F].float(), self.activation).to(self.dtype) * gate_up[:, F:]

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = functional.linear(x, self.gate_up)
        return functional.linear(activate(gate_up[:, :F], self.activation) * gate_up[:, F:], self.down)

    def expect(self, x: torch.Tensor, level: int, layer: int) -> tuple[torch.Tensor, float, torch.Tensor]:
        """Output of one row (D,), float64, the share of work, and how near its scores (F,) are to the threshold."""
        kind, parameter = int(self.table.kind_LV[layer, level]), float(self.table.parameter_LV[layer, level])
        gate, up = (functional.linear(x.double(), w.double()) for w in self.gate_up.chunk(2))
        active = activate(gate, self.activation)
        score = (active if self.scores_activation else gate).abs() * self.scale.double()
        keep, down = torch.ones(F, dtype=torch.bool), self.neuron_down.double()
        if kind == KIND_FULL:
            down = self.down.double().T
        if kind == KIND_SKIP:
            keep[:] = False
        if kind == KIND_WIDTH:
            keep[:] = False
            keep[self.order[: int(parameter)]] = True
        if kind == KIND_CONTEXTUAL:
            keep = score >= parameter
        share = float(keep.double().mean())
        return (active * up * keep) @ down, (1 + 2 * share) / 3 if kind == KIND_CONTEXTUAL else share, (score - parameter).abs()

    def begin(self, levels: list[int], *, promised: bool = False) -> None:
        count = len(levels)
        floor = np.array(levels, dtype=np.uint8)
        role = np.where(promised & (floor == 0), 0, DECIDES).astype(np.uint8)
        tokens = Tokens(
            role_T=role, floor_T=floor, goal_T=np.zeros(count, dtype=np.uint8), scale_T=np.ones(count, dtype=np.float32),
            tier_T=np.zeros(count, dtype=np.int64),
        )  # fmt: skip
        self.state.begin_step(count, tokens)

    def check(self, mlp: DeviceMlp, x: torch.Tensor, levels: list[int], *, saves_contextual: bool) -> torch.Tensor:
        """Run with unwritten memory poisoned; compare every live row, and what it counted as saved."""
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(True)  # torch.empty is NaN then
        try:
            out = mlp.compute(x)
        finally:
            torch.use_deterministic_algorithms(False)
        saved = self.state.buffers.saved_T[: len(levels)].clone()
        self.state.end_step()
        for t, level in enumerate(levels):
            expected, share, distance = self.expect(x[t], level, mlp.layer)
            kind = int(self.table.kind_LV[mlp.layer, level])
            error = (out[t].double() - expected).norm() / expected.norm().clamp(min=1e-3)
            assert error.isfinite(), f"row {t} at level {level}: {out[t]}"
            # a score that rounds over the threshold takes its neuron along
            near = self.dtype != torch.float32 and kind == KIND_CONTEXTUAL and bool((distance < 0.01).any())
            assert error < BOUNDS[self.dtype] + (0.2 if near else 0), f"row {t} at level {level}: error {error:.2e}"
            if kind == KIND_SKIP:
                assert saved[t] == 1
            elif kind == KIND_CONTEXTUAL and saves_contextual:
                assert 1 - saved[t].item() == pytest.approx(share, abs=1e-5 if self.dtype == torch.float32 else 0.02)
        return out
