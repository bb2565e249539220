"""Every form of the MLP against its definition in float64, on fresh inputs, with what is not written poisoned."""

from __future__ import annotations

import math

import pytest
import torch
from sedac.engine.backends.cuda import forms
from sedac.engine.backends.kinds import KIND_FULL
from torch.nn import functional

from tests.cuda.interpreted.cases import LAYERS, Case, D, F


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
