"""The host counts a GPU's steps later than they run: the same totals, a fixed lag, and nothing lost of a request that has finished."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from sedac.engine.backends.cuda.results import Waiting
from sedac.engine.backends.tokens import DECIDES, Tokens
from sedac.engine.step.requests import Requests
from sedac.policy.model import Adaptation, Checkpoint, Policy
from sedac.policy.request_keys import TIER_KEY

from tests.cuda.interpreted.states import D, make_state, make_tokens


def make_adaptive() -> Policy:
    checkpoints = tuple(Checkpoint(layer=layer, threshold=0.7) for layer in (1, 3))
    return Policy(enabled=True, checkpoints=checkpoints, adaptation=Adaptation(enabled=True, target_exit_rates=(0.3, 0.3), warmup_steps=0))


def run_step(state, tokens, count: int, seed: int):
    state.begin_step(count, tokens)
    generator = torch.Generator().manual_seed(seed)
    for layer in (1, 3):
        stream = torch.randn(count, D, generator=generator)
        if state.is_watching():
            state.observe(layer, stream)
    return state.end_step()


def test_totals_equal_those_of_a_host_that_waits():
    plain, device = make_state(8, on_device=False), make_state(8, on_device=True)
    generator = torch.Generator().manual_seed(3)
    for state in (plain, device):
        state.apply(Policy(enabled=True, checkpoints=(Checkpoint(layer=1, threshold=0.7), Checkpoint(layer=3, threshold=0.7))), 1)
    for seed in range(6):
        tokens = None if seed == 2 else make_tokens(generator, 5)
        if tokens is not None:
            tokens.role_T &= 7
        for state in (plain, device):
            run_step(state, tokens, 5, seed)
    assert device.get_stats() == plain.get_stats()


def test_thresholds_follow_with_a_lag_of_one_step():
    plain, device = make_state(8, on_device=False), make_state(8, on_device=True)
    for state in (plain, device):
        state.apply(make_adaptive(), 1)
    seen: dict[str, list[list[float]]] = {"plain": [], "device": []}
    for seed in range(5):
        ones = np.ones(6)
        tokens = Tokens(
            role_T=(ones * DECIDES).astype(np.uint8), floor_T=(ones * 0).astype(np.uint8), goal_T=ones.astype(np.uint8),
            scale_T=ones.astype(np.float32), tier_T=(ones * 0).astype(np.int64),
        )  # fmt: skip
        for name, state in (("plain", plain), ("device", device)):
            state.begin_step(6, tokens)
            seen[name].append(state.stable.knobs_CK[:, 0].tolist())
            state.observe(1, torch.randn(6, D, generator=torch.Generator().manual_seed(seed)))
            state.end_step()
        assert len(device.backend.waiting._steps) == min(2, seed + 1)
    assert seen["plain"][0] != seen["plain"][1], "the first step moves the thresholds"
    assert seen["device"][0] == seen["device"][1], "on a GPU it is read after the second has begun"
    assert seen["device"][2] == pytest.approx(seen["plain"][1], rel=1e-5)


def test_a_finished_request_is_counted_before_its_report_is_made():
    state = make_state(8, on_device=True)
    state.apply(Policy(enabled=True, checkpoints=(Checkpoint(layer=1, threshold=1e9),)), 1)
    requests, backend = Requests(state), state.backend
    requests.add("a", {TIER_KEY: "balanced"})
    bounds = np.array([0, 1])
    for _ in range(3):
        tokens = requests.make_tokens(["a"], bounds, np.array([1]), np.array([4]))
        run_step(state, tokens, 1, 0)
        backend.then(functools.partial(requests.count_step, ("a",), bounds.copy()))
    backend.then(lambda _: requests.finish(("a",)))
    assert requests.has("a")
    state.settle()
    report = requests.get_report("a")
    assert not requests.has("a")
    assert report["num_tokens"] == 3


def test_actions_keep_their_order_and_run_at_once_where_nothing_waits():
    waiting, seen = Waiting(), []
    waiting.then(lambda saved: seen.append(saved))
    waiting.add(None)
    waiting.then(lambda _: seen.append(1))
    waiting.add(None, lambda: (np.ones(2),))
    waiting.then(lambda _: seen.append(2))
    assert seen == [None]
    for step in waiting.take(1):
        for action in step.then:
            action(None)
    assert seen == [None, 1]
    (last,) = waiting.take(0)
    assert [array.tolist() for array in last.read()] == [[1.0, 1.0]]
