"""Every form of the MLP against its definition in float64, on fresh inputs, with what is not written poisoned."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from sedac.engine.backends.cuda import forms
from sedac.engine.backends.cuda.backend import CudaBackend
from sedac.engine.backends.cuda.mlp import DeviceMlp, DeviceNeurons, Parts
from sedac.engine.backends.kinds import KIND_CONTEXTUAL, KIND_FULL, KIND_SKIP, KIND_WIDTH
from sedac.engine.backends.levels import LevelTable
from sedac.engine.backends.neurons import ACTIVATIONS
from sedac.engine.step.state import State
from sedac.engine.step.tokens import DECIDES, Tokens
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


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("count", [1, 7, *(pytest.param(count, marks=pytest.mark.thorough) for count in (2, 16))])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"repaired": True}),
        (torch.float16, {"activation": "gelu_tanh", "scores_activation": True}),
        (torch.float32, {"activation": "gelu", "repaired": True}),
    ],
)
def test_few_rows(dtype, options, count, layer, seed):
    case = Case(dtype, seed=seed, **options)
    mlp = case.make(layer, forms.FEW)
    for low in (1, 0):  # without full rows, and with them: the module's own products, masked
        levels = torch.randint(low, 6, (count,)).tolist()
        case.begin(levels)
        has_full = any(case.table.kind_LV[layer, level] == KIND_FULL for level in levels)
        padding = torch.full((3, D), math.nan).to(dtype)
        x = torch.cat([torch.randn(count, D).to(dtype), padding])
        case.check(mlp, x, levels, saves_contextual=not has_full)
        assert not case.state.backend.count_T.any()
        assert not case.state.backend.arrived.any()


@pytest.mark.parametrize("has_neurons", [True, False], ids=["levels", "skips"])
@pytest.mark.parametrize("repaired", [True, False], ids=["repaired", "own"])
@pytest.mark.parametrize("count", [1, 33])
def test_middle_rows(count, repaired, has_neurons):
    case = Case(torch.float32, repaired=repaired)
    mlp = case.make(0, forms.MIDDLE, has_neurons=has_neurons)
    for levels in (torch.randint(0, 6 if has_neurons else 2, (count,)).tolist(), [1] * count, [0] * count):
        case.begin(levels)
        case.check(mlp, torch.randn(count + 2, D), levels, saves_contextual=False)


@pytest.mark.parametrize("levels", [[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
def test_of_another_module_rows_are_its_own_or_skipped(levels):
    case = Case(torch.float32)
    mlp = case.make(0, None, has_neurons=False, is_known=False)
    assert {mlp.choose_form(count) for count in (1, 4, 64, 200)} == {forms.MIDDLE}
    case.begin(levels)
    case.check(mlp, torch.randn(6, D), levels, saves_contextual=False)


@pytest.mark.parametrize("form", [forms.FEW, forms.MIDDLE])
def test_an_activation_of_vllms_own_keeps_its_bits_and_reduced_rows_are_masked_behind_it(form):
    case = Case(torch.float16, own_activation=True, repaired=True)
    mlp, levels, x = case.make(0, form), [0, 2, 1, 3, 4] * 3, torch.randn(16, D).to(torch.float16)
    case.begin(levels)
    out = case.check(mlp, x, levels, saves_contextual=False)
    gate_up = functional.linear(x, case.gate_up)
    plain = functional.linear(case.activate_twice_rounded(gate_up), case.down)
    full = [t for t, level in enumerate(levels) if level == 0]
    assert torch.equal(out[full], plain[full])
    assert torch.equal(mlp.compute_plain(x), plain)


@pytest.mark.parametrize("promised", [False, True], ids=["grouped", "promised"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float32, {"repaired": True}), (torch.bfloat16, {}), (torch.float16, {"activation": "gelu", "scores_activation": True})],
)
@pytest.mark.parametrize("has_neurons", [True, False], ids=["levels", "skips"])
@pytest.mark.parametrize(("layer", "count"), [(0, 70), (1, 3), pytest.param(0, 130, marks=pytest.mark.thorough)])
def test_many_rows(has_neurons, dtype, options, promised, layer, count):
    case = Case(dtype, seed=count, **options)
    mlp = case.make(layer, forms.MANY, has_neurons=has_neurons)
    levels = torch.randint(0, 6 if has_neurons else 2, (count,)).tolist()
    x = torch.randn(count + 2, D).to(dtype)
    case.begin(levels, promised=promised)
    out = case.check(mlp, x, levels, saves_contextual=False)  # ends the step
    full = [t for t, level in enumerate(levels) if case.table.kind_LV[layer, level] == KIND_FULL]
    if promised and not has_neurons and full:
        assert torch.equal(out[full], mlp.compute_plain(x)[full]), "promised rows have the bits that they have between steps"


def test_rows_that_were_promised_are_the_modules_own_bits():
    case = Case(torch.float16)  # the interpreter rounds to bf16 as no GPU does
    x = torch.randn(6, D).to(torch.float16)
    for form in (forms.FEW, forms.MIDDLE, forms.MANY):
        case.begin([0, 2, 0, 1, 5, 0], promised=True)
        out = case.make(0, form).compute(x)
        case.state.end_step()
        gate_up = functional.linear(x, case.gate_up)
        gate, up = gate_up[:, :F].float(), gate_up[:, F:].float()
        h = (gate * torch.sigmoid(gate) * up).to(torch.float16)  # rounded once, as torch.compile's fused form
        assert torch.equal(out[[0, 2, 5]], functional.linear(h, case.down)[[0, 2, 5]])


def test_a_row_does_not_depend_on_who_shares_its_step():
    case = Case(torch.float32)
    x = torch.randn(80, D)
    for form, count in ((forms.FEW, 12), (forms.MANY, 80)):
        mlp, results = case.make(0, form), []
        for others in (1, 3, 5):
            levels = [others] * count
            levels[3] = 5
            case.begin(levels)
            results.append(mlp.compute(x[:count])[3])
            case.state.end_step()
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def test_between_steps_everything_is_the_modules_own():
    case = Case(torch.float32)
    x = torch.randn(5, D)
    for form in (forms.FEW, forms.MIDDLE, forms.MANY):
        torch.testing.assert_close(case.make(0, form).compute(x), case.plain(x), rtol=1e-5, atol=1e-6)
    assert not case.state.buffers.saved_T.any()
