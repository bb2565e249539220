"""The native MLP operators, and their plain torch form, against the naive reductions: every mix of levels, few rows and many."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sedac.engine.backends.cpu import load
from sedac.engine.backends.kinds import KIND_CONTEXTUAL, KIND_WIDTH, KINDS
from sedac.engine.backends.neurons import ACTIVATIONS
from sedac.engine.backends.tokens import Tokens

from tests.engine.kernel_case import LAYERS, LEVELS, Case, D, F


@pytest.mark.parametrize("count", [1, 2, 3, 8, 13, 40])
@pytest.mark.parametrize("repaired", [False, True], ids=["own", "repaired"])
@pytest.mark.parametrize(
    ("dtype", "activation", "score"),
    [(torch.float32, "silu", "gate"), (torch.float32, "gelu_tanh", "activation"), (torch.float32, "gelu", "gate"), (torch.bfloat16, "silu", "gate")],
)
def test_every_reduction_equals_its_naive_form(dtype, activation, score, repaired, count):
    case = Case(dtype, activation, score, repaired)
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(count, D, dtype=dtype)
        mixed = torch.randint(0, 6, (count,)).tolist()
        for levels in (mixed, [2 + seed] * count, [1] * count):
            for layer in range(LAYERS):
                out, computed = case.run(x, levels, layer, compact=seed == 1)
                kinds = [int(case.table.kind_LV[layer][i]) for i in levels]
                many = kinds.count(KIND_CONTEXTUAL) > 2 or kinds.count(KIND_CONTEXTUAL) + kinds.count(KIND_WIDTH) > 8
                for t, level in enumerate(levels):
                    expected, share = case.expect(x[t : t + 1], level, layer)
                    if dtype == torch.float32:
                        torch.testing.assert_close(out[t : t + 1], expected, rtol=1e-4, atol=1e-5)
                    else:  # a gate rounded to bf16 may pass the threshold where the exact one does not: a neuron more or less
                        assert (out[t] - expected[0]).norm() <= 0.1 * expected.norm() + 0.05
                    if not (many and LEVELS[level - 2].reduction == "contextual" and level > 1):  # computed in full, then masked
                        assert computed[t].item() == pytest.approx(share.item(), abs=0.02 if dtype == torch.bfloat16 else 1e-5)


def test_full_rows_are_bit_for_bit_the_plain_products():
    case = Case(torch.bfloat16, "silu", "gate", repaired=True)
    x = torch.randn(9, D, dtype=torch.bfloat16)
    assert torch.equal(case.run(x, [0] * 9, 0)[0], case.plain(x))
    out = case.run(x, [0, 2, 0, 1, 0, 3, 0, 4, 5], 0)[0]
    full = x[[0, 2, 4, 6]]
    assert torch.equal(out[[0, 2, 4, 6]], case.plain(full))


def test_full_width_in_any_order_equals_the_plain_mlp():
    case = Case(torch.float32, "silu", "gate", repaired=False)
    x = torch.randn(5, D)
    for parameter in (F, F - 1e-9):
        whole, _ = KINDS[KIND_WIDTH].compute(x, parameter if parameter == F else F, case.weights, case.plain)
        torch.testing.assert_close(whole, case.plain(x), rtol=1e-5, atol=1e-5)
    torch.ops.sedac.add_mlp(
        0, *[h.handler_tensor for h in case.handlers], D, torch.full((16,), 2, dtype=torch.uint8), torch.full((16,), float(F)), ACTIVATIONS["silu"]
    )
    w = case.weights
    torch.ops.sedac.set_neurons(0, w.gate_FD, w.up_FD, w.down_FD, w.scale_F, case.neurons.scale_F, None, False)
    torch.testing.assert_close(case.run(x, [3] * 5, 0)[0], case.plain(x), rtol=1e-5, atol=1e-5)


def test_the_plain_form_equals_the_naive_form_too():
    case = Case(torch.float32, "silu", "gate", repaired=True)
    x = torch.randn(6, D)
    for level in range(2, 6):
        kind, parameter = int(case.table.kind_LV[0][level]), float(case.table.parameter_LV[0][level])
        out, computed = KINDS[kind].compute(x, parameter, case.weights, case.plain)
        expected, share = case.expect(x, level, 0)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(computed, share)


def test_skip_all_says_when_nothing_is_left_to_compute():
    case = Case(torch.float32, "silu", "gate", repaired=False)
    x = torch.randn(3, D)
    for levels, expected in (([1, 1, 1], True), ([1, 0, 1], False)):
        ones = np.ones(3)
        case.state.begin_step(
            3,
            Tokens(
                role_T=ones.astype(np.uint8), floor_T=np.array(levels, dtype=np.uint8), goal_T=ones.astype(np.uint8),
                scale_T=ones.astype(np.float32), tier_T=ones.astype(np.int64) * 0,
            ),
        )  # fmt: skip
        skipped = torch.ops.sedac.skip_all(x, 0)
        assert (skipped is not None) == expected
        if skipped is not None:
            assert torch.equal(skipped, torch.zeros_like(x))
        case.state.end_step()


def test_kernels_are_there():
    assert load()
