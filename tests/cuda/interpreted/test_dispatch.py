"""From the engine's own entry points to the forms: attach, finish, forward, in steps and between them, traced and not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sedac.engine.backends.cuda import forms, gated
from sedac.engine.backends.cuda.backend import CudaBackend
from sedac.engine.backends.levels import LevelTable
from sedac.engine.backends.tokens import DECIDES, Tokens
from sedac.engine.step import checkpoint
from sedac.engine.step.state import State
from sedac.errors import UnsupportedModel
from sedac.policy.layout import Layout
from sedac.policy.model import Checkpoint, Policy, Tier
from sedac.probe.levels import Level, Neurons, reduce_mlp
from sedac.probe.probe import LREProbe
from torch import nn
from torch.nn import functional
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

CPU = torch.device("cpu")
D, F, LAYERS = 32, 96, 3
LEVELS = (
    Level(name="contextual-50", reduction="contextual", parameters_L=torch.full((LAYERS,), 0.3)),
    Level(name="width-50", reduction="width", parameters_L=torch.full((LAYERS,), 40, dtype=torch.int32)),
)
LAYOUT = Layout(
    num_layers=LAYERS, hidden_size=D, checkpoint_layers=(0,), probe_set="t", probe_set_sha256="0" * 64,
    levels=("full", "skip", *(level.name for level in LEVELS)), max_rank=8,
)  # fmt: skip


class SiluAndMul(nn.Module):
    def forward(self, x):
        half = x.shape[-1] // 2
        return functional.silu(x[..., :half]) * x[..., half:]


class Linear(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.quant_method, self.reduce_results = (
            nn.Parameter(weight, requires_grad=False),
            None,
            UnquantizedLinearMethod(),
            True,
        )

    def forward(self, x):
        return self.quant_method.apply(self, x), None


class Mlp(nn.Module):
    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn = Linear(gate_up), Linear(down), SiluAndMul()

    def forward(self, x):
        gate_up, _ = self.gate_up_proj(x)
        out, _ = self.down_proj(self.act_fn(gate_up))
        return out


class ScaledMlp(Mlp):
    def forward(self, x):
        return 2 * super().forward(x)


class Layer(nn.Module):
    def __init__(self, inner: Mlp) -> None:
        super().__init__()
        self.mlp = inner

    def forward(self, positions, hidden_states, residual):
        return self.mlp(hidden_states), residual


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(UnquantizedLinearMethod, "apply", lambda self, layer, x, bias=None: functional.linear(x, layer.weight))
    set_ranks(monkeypatch, 0, 1)


def set_ranks(monkeypatch, rank: int, world_size: int) -> None:
    monkeypatch.setattr(gated, "get_tensor_model_parallel_rank", lambda: rank)
    monkeypatch.setattr(gated, "get_tensor_model_parallel_world_size", lambda: world_size)


class Model:
    """Weights, calibration and a state that decides with the device's forms."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.gate, self.up, self.down = torch.randn(F, D) * 0.3, torch.randn(F, D) * 0.3, torch.randn(D, F) * 0.3
        self.neurons = Neurons(order_F=torch.randperm(F, dtype=torch.int32), scale_F=torch.rand(F), repair_FD=None)
        self.probe = LREProbe(D, 8).requires_grad_(False)
        self.state = self.make_state()

    def make_state(self) -> State:
        table = LevelTable(LAYERS, LEVELS, (0.5, 0.6), F, CPU)
        return State(LAYOUT, {0: self.probe}, table, max_num_tokens=160, device=CPU, make_backend=CudaBackend)

    def make_mlp(self, name: str = "m", *, mine: slice = slice(None), state: State | None = None, neurons: bool = True, lora: bool = False) -> Mlp:
        made = Mlp(torch.cat([self.gate[mine], self.up[mine]]), self.down[:, mine].contiguous())
        given = self.neurons if neurons else None
        backend = (state or self.state).backend
        backend.attach_mlp(made, name, 1, given, scores_activation=False, lora=lora)
        backend.finish_mlp(made)
        return made

    def expect(self, x: torch.Tensor, level: int) -> torch.Tensor:
        if level < 2:
            return Mlp(torch.cat([self.gate, self.up]), self.down)(x) * (level == 0)
        return reduce_mlp(x, self.gate, self.up, self.down, level=LEVELS[level - 2], layer=1, neurons=self.neurons)[0]


def begin(state: State, levels: list[int]) -> None:
    count = len(levels)
    tokens = Tokens(
        role_T=np.full(count, DECIDES, dtype=np.uint8), floor_T=np.array(levels, dtype=np.uint8), goal_T=np.ones(count, dtype=np.uint8),
        scale_T=np.ones(count, dtype=np.float32), tier_T=np.zeros(count, dtype=np.int64),
    )  # fmt: skip
    state.begin_step(count, tokens)


@pytest.mark.parametrize("count", [1, 4, 20, 140])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "traced"])
def test_every_row_gets_its_level_through_the_engines_operator(count, compiled, monkeypatch):
    monkeypatch.setattr(forms, "MIN_WEIGHT_BYTES", 0)
    model = Model()
    model.state.apply(Policy(enabled=True), 1)
    made = model.make_mlp()
    assert made.sedac.device.choose_form(count) == (forms.FEW if count <= 16 else forms.MIDDLE if count < 128 else forms.MANY)
    run = torch.compile(made, backend="eager", fullgraph=True) if compiled else made
    for seed, lowest in ((1, 0), (2, 1)):
        torch.manual_seed(seed)
        x, levels = torch.randn(count, D), torch.randint(lowest, 4, (count,)).tolist()
        begin(model.state, levels)
        out = run(x)
        model.state.end_step()
        expected = torch.cat([model.expect(x[t : t + 1], level) for t, level in enumerate(levels)])
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(run(x), model.expect(x, 0), rtol=1e-5, atol=1e-6)  # between steps the module is vLLM's own


@pytest.mark.parametrize("lora", [False, True])
def test_without_neurons_rows_are_full_or_skipped(lora):
    model = Model()
    model.state.apply(Policy(enabled=True), 1)
    made = model.make_mlp(neurons=False, lora=lora)
    assert (made.sedac.device.parts is None) == lora
    for levels in ([0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]):
        begin(model.state, levels)
        x = torch.randn(4, D)
        out = made(x)
        model.state.end_step()
        torch.testing.assert_close(out, torch.cat([model.expect(x[t : t + 1], level) for t, level in enumerate(levels)]), rtol=1e-5, atol=1e-6)


def test_an_mlp_that_computes_more_is_not_taken_apart(monkeypatch):
    model = Model()
    model.state.apply(Policy(enabled=True), 1)
    for neurons in (None, model.neurons):
        made = ScaledMlp(torch.cat([model.gate, model.up]), model.down)
        model.state.backend.attach_mlp(made, "scaled", 1, neurons, scores_activation=False, lora=False)
        if neurons is not None:
            with pytest.raises(UnsupportedModel, match=r"scaled computes more.*SEDAC_LEVELS=0"):
                model.state.backend.finish_mlp(made)
            continue
        model.state.backend.finish_mlp(made)
        begin(model.state, [0, 1])
        x = torch.randn(2, D)
        out = made(x)
        model.state.end_step()
        torch.testing.assert_close(out, torch.cat([2 * model.expect(x[:1], 0), torch.zeros(1, D)]), rtol=1e-4, atol=1e-5)


def test_long_passes_outside_graphs_never_wait_for_the_device(monkeypatch):
    model = Model()
    model.state.apply(Policy(enabled=True), 1)
    made = model.make_mlp()
    monkeypatch.setattr("sedac.engine.backends.cuda.mlp.MAX_HOST_ROWS", 8)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: pytest.fail("the host read a flag"))
    levels = [0, 1, 2, 3] * 5
    begin(model.state, levels)
    x = torch.randn(20, D)
    out = made.sedac.device.compute(x)
    monkeypatch.undo()
    model.state.end_step()
    set_ranks(monkeypatch, 0, 1)
    monkeypatch.setattr(UnquantizedLinearMethod, "apply", lambda self, layer, x, bias=None: functional.linear(x, layer.weight))
    torch.testing.assert_close(out, torch.cat([model.expect(x[t : t + 1], level) for t, level in enumerate(levels)]), rtol=1e-4, atol=1e-5)


def test_two_ranks_add_up_to_one(monkeypatch):
    model = Model()
    x, levels, parts = torch.randn(6, D), [0, 1, 2, 3, 3, 2], []
    monkeypatch.setattr(gated, "tensor_model_parallel_all_reduce", lambda part: parts.append(part) or part)
    for rank in range(2):
        set_ranks(monkeypatch, rank, 2)
        state = model.make_state()
        state.apply(Policy(enabled=True), 1)
        made = model.make_mlp(f"rank{rank}", mine=slice(rank * F // 2, (rank + 1) * F // 2), state=state)
        assert not made.down_proj.reduce_results
        begin(state, levels)
        made(x)
        state.end_step()
    expected = torch.cat([model.expect(x[t : t + 1], level) for t, level in enumerate(levels)])
    torch.testing.assert_close(parts[0] + parts[1], expected, rtol=1e-4, atol=1e-5)


def test_ranks_that_add_up_inside_are_refused(monkeypatch):
    set_ranks(monkeypatch, 0, 2)
    model = Model()
    made = Mlp(torch.cat([model.gate, model.up]), model.down)
    made.down_proj.reduce_results = False
    with pytest.raises(UnsupportedModel, match="tensor_parallel_size 1"):
        model.state.backend.attach_mlp(made, "m", 1, None, scores_activation=False, lora=False)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "traced"])
def test_a_checkpoint_decides_for_the_layers_above_it(compiled, monkeypatch):
    monkeypatch.setattr(forms, "MIN_WEIGHT_BYTES", 0)
    model = Model()
    layer, above = Layer(model.make_mlp("below", neurons=False)), model.make_mlp("above")
    checkpoint.attach(layer, 0, f"layer-{compiled}", model.state)
    policy = Policy(enabled=True, checkpoints=(Checkpoint(layer=0, threshold=1e9),), tiers=(Tier(name="balanced", level="width-50"),))

    def run(positions, hidden, residual):
        hidden, residual = layer(positions, hidden, residual)
        return hidden, above(hidden + residual)

    forward = torch.compile(run, backend="eager", fullgraph=True) if compiled else run
    hidden, residual = torch.randn(5, D), torch.randn(5, D)
    for threshold, level in ((1e9, 3), (0.0, 0), (1e-9, 0)):
        changed = Policy(enabled=True, checkpoints=(Checkpoint(layer=0, threshold=threshold),), tiers=policy.tiers)
        model.state.apply(changed, 1)
        begin(model.state, [0] * 5)
        model.state.buffers.goal_T[:5] = 3
        below, out = forward(None, hidden, residual)
        model.state.end_step()
        torch.testing.assert_close(out, model.expect(below + residual, level), rtol=1e-4, atol=1e-5)
