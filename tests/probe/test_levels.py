"""What a level means, by its naive form: the extremes are the plain MLP and nothing, in between every neuron is its own matter."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from sedac.probe.levels import ACTIVATIONS, Level, Neurons, activate, get_mask, reduce_mlp
from torch.nn import functional

T, D, F = 7, 12, 20


def make(seed=0, *, repair=False):
    torch.manual_seed(seed)
    weights = torch.randn(F, D), torch.randn(F, D), torch.randn(D, F)
    neurons = Neurons(
        order_F=torch.randperm(F).int(), scale_F=torch.rand(F) + 0.1, repair_FD=torch.randn(F, D).bfloat16() if repair else None
    )  # fmt: skip
    return torch.randn(T, D), weights, neurons


def at(reduction, parameter):
    dtype = torch.int32 if reduction == "width" else torch.float32
    return Level(name="x", reduction=reduction, parameters_L=torch.tensor([parameter], dtype=dtype))


def plain(x, weights, activation="silu"):
    gate, up, down = weights
    return (activate(x @ gate.T, activation) * (x @ up.T)) @ down.T


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("reduction", "whole"), [("width", F), ("contextual", 0.0)])
@pytest.mark.parametrize("repair", [False, True])
def test_a_layer_left_whole_is_the_plain_mlp_without_repair(activation, reduction, whole, repair):
    x, weights, neurons = make(repair=repair)
    y, computed = reduce_mlp(x, *weights, level=at(reduction, whole), layer=0, neurons=neurons, activation=activation)
    torch.testing.assert_close(y, plain(x, weights, activation), atol=1e-5, rtol=1e-5)
    assert computed.tolist() == [1.0] * T


@pytest.mark.parametrize(("reduction", "nothing"), [("width", 0), ("contextual", math.inf)])
@pytest.mark.parametrize("repair", [False, True])
def test_an_empty_layer_adds_nothing_and_costs_nothing(reduction, nothing, repair):
    x, weights, neurons = make(repair=repair)
    y, computed = reduce_mlp(x, *weights, level=at(reduction, nothing), layer=0, neurons=neurons)
    assert not y.any()
    assert not computed.any()


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("score", ["gate", "activation"])
@pytest.mark.parametrize(("reduction", "parameter"), [("width", 13), ("contextual", 0.7)])
def test_equals_plain_python_neuron_by_neuron(reduction, parameter, score, repair):
    x, (gate, up, down), neurons = make(1, repair=repair)
    y, computed = reduce_mlp(x, gate, up, down, level=at(reduction, parameter), layer=0, neurons=neurons, score=score)
    rows = down.T if neurons.repair_FD is None else neurons.repair_FD.float()
    for t in range(T):
        expected, active = torch.zeros(D), 0
        for n in range(F):
            g = gate[n] @ x[t]
            source = g if score == "gate" else functional.silu(g)
            leading = neurons.order_F[:13].tolist()
            if n in leading if reduction == "width" else abs(source.item()) * neurons.scale_F[n].item() >= 0.7:
                expected += functional.silu(g) * (up[n] @ x[t]) * rows[n]
                active += 1
        torch.testing.assert_close(y[t], expected, atol=1e-4, rtol=1e-4)
        share = active / F if reduction == "width" else (F * D + 2 * active * D) / (3 * F * D)  # contextual has paid the gate
        assert computed[t].item() == pytest.approx(share)
    assert 0 < computed.min() <= computed.max() < 1  # the case is no extreme


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize(("reduction", "parameter"), [("width", 9), ("contextual", 0.5)])
def test_how_neurons_are_numbered_does_not_matter(reduction, parameter, repair):
    x, (gate, up, down), neurons = make(2, repair=repair)
    to = torch.randperm(F)
    place = torch.empty(F, dtype=torch.int32)
    place[to] = torch.arange(F, dtype=torch.int32)
    renumbered = Neurons(
        order_F=place[neurons.order_F.long()],
        scale_F=neurons.scale_F[to],
        repair_FD=None if neurons.repair_FD is None else neurons.repair_FD[to],
    )
    level = at(reduction, parameter)
    y, computed = reduce_mlp(x, gate, up, down, level=level, layer=0, neurons=neurons)
    again, computed_again = reduce_mlp(x, gate[to], up[to], down[:, to], level=level, layer=0, neurons=renumbered)
    torch.testing.assert_close(again, y, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(computed_again, computed)


@pytest.mark.parametrize("reduction", ["width", "contextual"])
def test_a_stricter_level_keeps_a_subset(reduction):
    x, (gate, _, _), neurons = make(3)
    ladder = [F, 15, 8, 1, 0] if reduction == "width" else [0.0, 0.3, 0.9, 2.0, math.inf]
    masks = [get_mask(x @ gate.T, at(reduction, p), 0, neurons, "silu", "gate") for p in ladder]
    assert masks[0].all()
    assert not masks[-1].any()
    for wider, narrower in pairwise(masks):
        assert (wider | ~narrower).all()
        assert wider.sum() > narrower.sum()


def test_a_token_gets_the_same_alone_as_in_company():
    x, weights, neurons = make(4, repair=True)
    for level in (at("width", 9), at("contextual", 0.5)):
        y, computed = reduce_mlp(x, *weights, level=level, layer=0, neurons=neurons)
        for t in range(T):
            alone, computed_alone = reduce_mlp(x[t : t + 1], *weights, level=level, layer=0, neurons=neurons)
            torch.testing.assert_close(alone[0], y[t], atol=1e-5, rtol=1e-5)
            assert computed_alone.item() == computed[t].item()


def test_each_layer_goes_by_its_own_parameter():
    x, weights, neurons = make(5)
    level = Level(name="x", reduction="width", parameters_L=torch.tensor([F, 0, 5], dtype=torch.int32))
    assert [reduce_mlp(x, *weights, level=level, layer=n, neurons=neurons)[1][0].item() for n in range(3)] == [1.0, 0.0, 0.25]
