"""What a level means, held against the plain MLP at its ends and against a loop over tokens and neurons between them."""

from __future__ import annotations

import math

import pytest
import torch
from sedac.probe.levels import ACTIVATIONS, Level, Neurons, activate, reduce_mlp
from torch.nn import functional

T, F, D = 5, 12, 6


@pytest.fixture
def mlp():
    generator = torch.Generator().manual_seed(0)
    x_TD, gate_FD, up_FD, down_DF = (torch.randn(shape, generator=generator) for shape in ((T, D), (F, D), (F, D), (D, F)))
    order_F = torch.randperm(F, generator=generator).to(torch.int32)
    return (x_TD, gate_FD, up_FD, down_DF), Neurons(order_F=order_F, scale_F=torch.rand(F, generator=generator) + 0.1, repair_FD=None)


def at(reduction, *parameters):
    dtype = torch.int32 if reduction == "width" else torch.float32
    return Level(name="x", reduction=reduction, parameters_L=torch.tensor(parameters, dtype=dtype))


def plain(x_TD, gate_FD, up_FD, down_DF, activation="silu"):
    return (activate(x_TD @ gate_FD.T, activation) * (x_TD @ up_FD.T)) @ down_DF.T


def with_repair(neurons, repair_FD):
    return Neurons(order_F=neurons.order_F, scale_F=neurons.scale_F, repair_FD=repair_FD)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("level", [at("width", F), at("contextual", 0.0)], ids=["width", "contextual"])
def test_the_whole_level_is_the_plain_mlp_and_needs_no_repair(mlp, level, activation):
    weights, neurons = mlp
    spoiled = with_repair(neurons, torch.full((F, D), 99.0, dtype=torch.bfloat16))
    y_TD, computed_T = reduce_mlp(*weights, level=level, layer=0, neurons=spoiled, activation=activation)
    torch.testing.assert_close(y_TD, plain(*weights, activation), rtol=1e-5, atol=1e-5)
    assert computed_T.tolist() == [1.0] * T


@pytest.mark.parametrize("level", [at("width", 0), at("contextual", math.inf)], ids=["width", "contextual"])
def test_the_empty_level_is_zero_and_costs_nothing(mlp, level):
    weights, neurons = mlp
    y_TD, computed_T = reduce_mlp(*weights, level=level, layer=0, neurons=neurons)
    assert not y_TD.any()
    assert not computed_T.any()


def test_each_layer_has_its_own_parameter(mlp):
    weights, neurons = mlp
    level = at("width", F, 0)
    assert reduce_mlp(*weights, level=level, layer=0, neurons=neurons)[0].any()
    assert not reduce_mlp(*weights, level=level, layer=1, neurons=neurons)[0].any()


@pytest.mark.parametrize("level", [at("width", 7), at("width", F), at("contextual", 0.4)], ids=["width", "all", "contextual"])
def test_permuting_the_neurons_changes_nothing(mlp, level):
    (x_TD, gate_FD, up_FD, down_DF), neurons = mlp
    p = torch.randperm(F, generator=torch.Generator().manual_seed(1))
    moved = Neurons(order_F=p.argsort()[neurons.order_F.long()].to(torch.int32), scale_F=neurons.scale_F[p], repair_FD=None)
    y_TD, computed_T = reduce_mlp(x_TD, gate_FD, up_FD, down_DF, level=level, layer=0, neurons=neurons)
    moved_TD, moved_T = reduce_mlp(x_TD, gate_FD[p], up_FD[p], down_DF[:, p], level=level, layer=0, neurons=moved)
    torch.testing.assert_close(moved_TD, y_TD, rtol=1e-5, atol=1e-5)
    assert torch.equal(moved_T, computed_T)


@pytest.mark.parametrize("repair", [False, True], ids=["own", "repaired"])
@pytest.mark.parametrize("score", ["gate", "activation"])
@pytest.mark.parametrize("level", [at("width", 1), at("width", 7), at("contextual", 0.2), at("contextual", 1.0)], ids=["1", "7", "low", "high"])
def test_equals_a_loop_over_tokens_and_neurons(mlp, level, score, repair):
    (x_TD, gate_FD, up_FD, down_DF), neurons = mlp
    if repair:
        neurons = with_repair(neurons, torch.randn(F, D, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16))
    rows_FD = neurons.repair_FD.float() if repair else down_DF.T
    kept = [int(n) for n in neurons.order_F[: int(level.parameters_L[0])]]
    y_TD, computed_T = reduce_mlp(x_TD, gate_FD, up_FD, down_DF, level=level, layer=0, neurons=neurons, score=score)
    for t in range(T):
        expected_D, active = torch.zeros(D), 0
        for n in range(F):
            gate = (x_TD[t] @ gate_FD[n]).item()
            activation = functional.silu(torch.tensor(gate)).item()
            size = abs(gate if score == "gate" else activation) * neurons.scale_F[n].item()
            if n in kept if level.reduction == "width" else size >= level.parameters_L[0].item():
                expected_D += activation * (x_TD[t] @ up_FD[n]) * rows_FD[n]
                active += 1
        torch.testing.assert_close(y_TD[t], expected_D, rtol=1e-4, atol=1e-4)
        # Three products per neuron; contextual levels have computed every gate.
        flops = 3 * active if level.reduction == "width" else F + 2 * active
        assert computed_T[t].item() == pytest.approx(flops / (3 * F))


def test_a_score_at_the_threshold_counts(mlp):
    (x_TD, gate_FD, up_FD, down_DF), neurons = mlp
    neurons = Neurons(order_F=neurons.order_F, scale_F=torch.ones(F), repair_FD=None)
    gate = (x_TD @ gate_FD.T)[0, 3].abs()
    scores = (x_TD @ gate_FD.T)[0].abs()
    _, computed_T = reduce_mlp(x_TD, gate_FD, up_FD, down_DF, level=at("contextual", gate.item()), layer=0, neurons=neurons)
    assert computed_T[0].item() == pytest.approx((1 + 2 * (scores >= gate).sum().item() / F) / 3)
