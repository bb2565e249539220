"""One random MLP with levels, and the native operators registered for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import vllm._custom_ops as ops
from sedac.engine.backends.cpu import CpuBackend
from sedac.engine.backends.kinds import KIND_FULL, KIND_SKIP
from sedac.engine.backends.levels import LevelTable
from sedac.engine.backends.neurons import ACTIVATIONS, NeuronWeights, sort_neurons
from sedac.engine.backends.tokens import Tokens
from sedac.engine.step.state import State
from sedac.policy.layout import Layout
from sedac.policy.model import Policy
from sedac.probe.levels import Level, Neurons, activate, reduce_mlp

D, F, LAYERS = 64, 160, 2
CPU = torch.device("cpu")
LEVELS = (
    Level(name="contextual-20", reduction="contextual", parameters_L=torch.tensor([0.05, 0.0])),
    Level(name="width-30", reduction="width", parameters_L=torch.tensor([112, F], dtype=torch.int32)),
    Level(name="contextual-50", reduction="contextual", parameters_L=torch.tensor([0.4, float("inf")])),
    Level(name="width-60", reduction="width", parameters_L=torch.tensor([61, 0], dtype=torch.int32)),
)


class Case:
    """One random MLP, its levels, and the operators registered for it."""

    def __init__(self, dtype: torch.dtype, activation: str, score: str, repaired: bool) -> None:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            pytest.skip("oneDNN has no bf16 product on this CPU (no AVX-512), and vLLM makes no handler here for the operators to take")
        torch.manual_seed(3)
        self.dtype, self.activation, self.score = dtype, activation, score
        self.gate, self.up = (torch.randn(F, D, dtype=dtype) * 0.2 for _ in range(2))
        self.down = torch.randn(D, F, dtype=dtype) * 0.2
        repair = (self.down.T.float() * 1.1).bfloat16().contiguous() if repaired else None
        self.neurons = Neurons(order_F=torch.randperm(F, dtype=torch.int32), scale_F=torch.rand(F), repair_FD=repair)
        self.table = LevelTable(LAYERS, LEVELS, (0.2, 0.3, 0.5, 0.6), F, CPU)
        layout = Layout(num_layers=LAYERS, hidden_size=D, checkpoint_layers=(), probe_set="t", levels=self.table.names)
        self.state = State(layout, {}, self.table, max_num_tokens=64, device=CPU, make_backend=CpuBackend)
        self.state.apply(Policy(enabled=True), 1)
        order, _ = sort_neurons(self.neurons, 0, 1)
        down = self.down.T[order] if repair is None else repair.to(dtype)[order]
        self.weights = NeuronWeights(
            gate_FD=self.gate[order].contiguous(), up_FD=self.up[order].contiguous(), down_FD=down.contiguous(), scale_F=self.neurons.scale_F[order],
            order_F=order, repaired=repaired, activation=activation, scores_activation=score == "activation",
        )  # fmt: skip
        self.handlers = [ops.create_onednn_mm(torch.cat([self.gate, self.up]).t(), 32), ops.create_onednn_mm(self.down.t(), 32)]
        w, n = self.weights, torch.ops.sedac
        for layer in range(LAYERS):
            tensors = [h.handler_tensor for h in self.handlers]
            n.add_mlp(layer, *tensors, D, self.table.kind_LV[layer], self.table.parameter_LV[layer], ACTIVATIONS[activation])
            order_F = order if repaired else None
            n.set_neurons(layer, w.gate_FD, w.up_FD, w.down_FD, w.scale_F, self.neurons.scale_F, order_F, w.scores_activation)

    def run(self, x: torch.Tensor, levels: list[int], layer: int, compact: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and share computed per token, by the operators."""
        count, zeros = len(levels), np.zeros(len(levels), dtype=np.uint8)
        floor = np.array(levels, dtype=np.uint8)
        self.state.begin_step(
            count, Tokens(role_T=zeros, floor_T=floor, goal_T=zeros, scale_T=np.ones(count, dtype=np.float32), tier_T=np.zeros(count, dtype=np.int64))
        )
        gate_up = torch.ops.sedac.gate_up(x, self.state.level_T, layer, 2 * F, compact)
        h = activate(gate_up[:, :F], self.activation) * gate_up[:, F:]
        out = torch.ops.sedac.down(h, self.state.level_T, layer, D)
        saved = self.state.end_step()
        return out, 1 - torch.from_numpy(np.zeros(count) if saved is None else saved).float()

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = ops.onednn_mm(self.handlers[0], x, None)
        return ops.onednn_mm(self.handlers[1], activate(gate_up[:, :F], self.activation) * gate_up[:, F:], None)

    def expect(self, x: torch.Tensor, level: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.table.kind_LV[layer][level] == KIND_SKIP:
            return torch.zeros_like(x), torch.zeros(x.shape[0])
        if self.table.kind_LV[layer][level] == KIND_FULL:
            return self.plain(x), torch.ones(x.shape[0])
        weights = [t.float() for t in (self.gate, self.up, self.down)]
        arguments = {"level": LEVELS[level - 2], "layer": layer, "neurons": self.neurons, "activation": self.activation, "score": self.score}
        return reduce_mlp(x.float(), *weights, **arguments)
