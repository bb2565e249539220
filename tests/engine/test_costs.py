"""Rows are computed at their level only where that is faster, by costs that are measured and kept; `strict` computes every row at its level."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sedac.engine.backends import cpu_costs
from sedac.engine.backends.cpu_costs import Costs, put_into_force
from sedac.engine.backends.neurons import ACTIVATIONS
from sedac.engine.vllm.parts import WeightForm, Weights, find_weights
from sedac.policy.model import Policy
from torch import nn
from vllm.model_executor.layers import utils

from tests.engine.kernel_case import LEVELS, Case, D, F

ROWS = [1, 2, 4, 8]
FULL = [10.0, 11.0, 12.0, 16.0]
NEVER = [math.inf] * len(ROWS)


def make_costs(split: float = 0.0, **levels: list[float]) -> Costs:
    """Costs in which only the named levels may be chosen."""
    named = {name.replace("_", "-"): costs for name, costs in levels.items()}
    below = [0.0, 10.0, 11.5, 15.0]  # one row less in full
    return Costs(
        rows=ROWS, full=FULL, partial=[cost + split for cost in below], levels={level.name: named.get(level.name, NEVER) for level in LEVELS}
    )


@pytest.fixture
def case():
    made = Case(torch.float32, "silu", "gate", repaired=False)
    yield made
    put_into_force(None)


def get_shares(case: Case, levels: list[int]) -> list[float]:
    """Shares of the MLP that the kernels compute of rows at these levels; what they give is held against the naive form of what they chose."""
    x = torch.randn(len(levels), D, generator=torch.Generator().manual_seed(1))
    out, computed = case.run(x, levels, 0)
    for t, level in enumerate(levels):
        wanted, _ = case.expect(x[t : t + 1], 0 if computed[t] == 1 else level, 0)
        torch.testing.assert_close(out[t : t + 1], wanted, rtol=1e-4, atol=1e-5)
    return computed.tolist()


def test_a_level_is_chosen_where_it_is_faster_and_full_where_it_is_not(case):
    put_into_force(make_costs(width_60=[5.0, 9.0, 12.0, 20.0]))
    width = 61 / F
    assert get_shares(case, [5]) == [pytest.approx(width)]
    assert get_shares(case, [5, 5]) == [pytest.approx(width)] * 2
    assert get_shares(case, [5] * 4) == [1.0] * 4
    assert get_shares(case, [5] * 3) == [pytest.approx(width)] * 3, "between 9 and 12 of 11.5: 10.5 is faster"
    assert get_shares(case, [3]) == [1.0], "never"


def test_a_gain_within_the_noise_is_none(case):
    put_into_force(make_costs(width_60=[9.6, *NEVER[1:]]))
    assert get_shares(case, [5]) == [1.0]


def test_a_part_of_the_rows_is_reduced_where_that_pays_with_what_splitting_costs(case):
    put_into_force(make_costs(width_60=[0.5, 1.0, 1.5, 2.0]))
    assert get_shares(case, [0, 5, 5, 5]) == [1.0, *[pytest.approx(61 / F)] * 3], "10 + 1.25 against 12"
    put_into_force(make_costs(split=2.0, width_60=[0.5, 1.0, 1.5, 2.0]))
    assert get_shares(case, [0, 5, 5, 5]) == [1.0] * 4


def test_skipping_all_rows_is_always_faster_and_skipping_some_only_where_fewer_cost_less(case):
    put_into_force(make_costs())
    assert get_shares(case, [1, 1]) == [0.0, 0.0]
    assert get_shares(case, [1, 0]) == [0.0, 1.0], "10 against 11"
    put_into_force(make_costs(split=5.0))
    assert get_shares(case, [1, 0]) == [1.0, 1.0]


def test_rows_that_choose_their_own_neurons_are_in_full_where_they_would_only_be_masked(case):
    put_into_force(make_costs(contextual_20=[1.0] * 4))
    assert get_shares(case, [2])[0] < 1
    assert get_shares(case, [2] * 4) == [1.0] * 4


def test_strict_computes_every_row_at_its_level(case):
    put_into_force(make_costs())
    case.state.apply(Policy(enabled=True, strict=True), 2)
    assert get_shares(case, [5, 5]) == [pytest.approx(61 / F)] * 2
    case.state.apply(Policy(enabled=True), 3)
    assert get_shares(case, [5, 5]) == [1.0, 1.0]


def make_mlps(case: Case) -> list[SimpleNamespace]:
    """What is measured of the case's two MLPs."""
    weights = {"gate_up": Weights(torch.empty(0), WeightForm.HANDLER)}
    rows = zip(case.table.kind_LV, case.table.parameter_LV, strict=True)
    return [
        SimpleNamespace(
            layer=i, has_kernels=True, kind_V=kind, parameter_V=parameter, neurons=case.weights, hidden_size=D, num_outputs=2 * F, weights=weights
        )
        for i, (kind, parameter) in enumerate(rows)
    ]


def test_costs_are_measured_at_the_first_starts_and_kept(case, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mlps, parameters = make_mlps(case), case.table.parameter_LV.clone()
    find = lambda: cpu_costs.find_costs(mlps, case.table, case.state.buffers, torch.float32)  # noqa: E731
    found = find()
    assert found.rows == [1, 2, 4, 8, 16, 32, 64]
    assert all(0 < cost < 1e6 for cost in found.full)
    assert found.levels["width-60"][0] < math.inf
    assert found.levels["contextual-20"][:2] != [math.inf] * 2
    assert found.levels["contextual-20"][2:] == [math.inf] * 5
    assert torch.equal(case.table.parameter_LV, parameters)
    assert not case.state.level_T.any()
    assert not case.state.buffers.active.any()
    again = find()
    assert again.num_starts == 2
    assert all(a <= b for a, b in zip(again.full, found.full, strict=True)), "the lesser of both"
    third = find()
    assert find() == third, "three starts have measured"
    [kept] = (tmp_path / "sedac" / "costs").iterdir()
    mlps[0].parameter_V[5] += 1
    find()
    assert len(list((tmp_path / "sedac" / "costs").iterdir())) == 2, "other levels have costs of their own"
    mlps[0].parameter_V[5] -= 1
    kept.write_text("{")
    assert find().rows == found.rows, "what can't be read is measured again"
    assert json.loads(kept.read_text())["rows"] == found.rows
    assert cpu_costs.find_costs([], case.table, case.state.buffers, torch.float32) is None


def test_costs_say_how_far_levels_pay():
    costs = Costs(rows=[1, 2, 4], full=[3.0, 3.0, 3.0], partial=[0.0] * 3, levels={"a": [1.0, 2.0, 4.0], "b": [4.0, 4.0, math.inf]})
    assert costs.get_faster_rows() == {"a": 2, "b": 0}


def test_a_user_without_a_cache_gets_costs_too(case, monkeypatch):
    monkeypatch.setattr(cpu_costs, "find_cache", lambda: None)
    assert cpu_costs.find_costs(make_mlps(case), case.table, case.state.buffers, torch.float32) is not None


FORMS = [WeightForm.HANDLER, WeightForm.PLAIN] + ([WeightForm.PACKED] if torch.cpu._is_amx_tile_supported() else [])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 3, 8, 40])
def test_full_rows_are_vllms_own_products_in_every_form_that_it_keeps_weights_in(form, count, monkeypatch):
    if form is WeightForm.HANDLER and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bf16 product on this CPU (no AVX-512)")
    monkeypatch.setattr(utils, "check_cpu_sgl_kernel", lambda n, k, dtype: form is WeightForm.PACKED)
    if form is WeightForm.PLAIN:
        monkeypatch.setattr(utils.ops, "_supports_onednn", False)
    torch.manual_seed(0)
    layers = []
    for shape in ((2 * F, D), (D, F)):
        layer = nn.Module()
        layer.weight = nn.Parameter(torch.randn(*shape).bfloat16(), requires_grad=False)
        utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
        layers.append(layer)
    found = [find_weights(layer) for layer in layers]
    assert [weights.form for weights in found] == [form, form]
    case = Case(torch.float32, "silu", "gate", repaired=False)  # for its buffers
    numbers = (ACTIVATIONS["silu"], *(weights.form for weights in found))
    torch.ops.sedac.add_mlp(0, found[0].tensor, found[1].tensor, D, case.table.kind_LV[0], case.table.parameter_LV[0], *numbers)
    x, h = torch.randn(count, D).bfloat16(), torch.randn(count, F).bfloat16()
    assert torch.equal(torch.ops.sedac.gate_up(x, case.state.level_T, 0, 2 * F, False), layers[0].cpu_linear(x, layers[0].weight, None))
    assert torch.equal(torch.ops.sedac.down(h, case.state.level_T, 0, D), layers[1].cpu_linear(h, layers[1].weight, None))
    assert not np.isnan(x.float().numpy()).any()


def test_a_kernel_that_nobody_knows_is_left_to_vllm():
    layer = nn.Module()
    layer.weight, zen = nn.Parameter(torch.randn(4, 4)), torch.randn(4, 4)
    layer.cpu_linear = lambda x, weight, bias: x @ zen
    assert find_weights(layer) is None
    assert find_weights(nn.Linear(4, 4)) is None
