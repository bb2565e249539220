"""The checkpoint's kernel against the CPU's, token by token: every rule, both sides, padding, poisoned inputs; risks against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sedac.engine.backends.cuda.backend import CudaBackend
from sedac.engine.backends.cuda.forms import FEW, MANY, MIDDLE
from sedac.engine.backends.kinds import KIND_FULL, KIND_SKIP, KIND_WIDTH
from sedac.engine.backends.levels import LevelTable
from sedac.engine.backends.tokens import DECIDES, OF_CANDIDATE, Tokens
from sedac.engine.step.state import State
from sedac.policy.layout import Layout
from sedac.policy.model import Candidate, Checkpoint, Policy
from sedac.probe.probe import LREProbe
from torch.nn import functional

from tests.cuda.interpreted.states import CPU, LAYERS, D, make_state, make_tokens


def make_policy(rule: str, scope: str, threshold: float) -> Policy:
    checkpoints = tuple(Checkpoint(layer=layer, threshold=t, weight=0.8, target=0.4) for layer, t in ((1, threshold), (3, 0.75)))
    return Policy(enabled=True, checkpoints=checkpoints, scope=scope, rule=rule, decay=0.5)


def get_flags(state: State, count: int) -> dict[int, list[bool]]:
    """What the dense products of each layer shall do, from the levels as they are, written as a loop."""
    table, levels = state.table, state.level_T[:count].tolist()
    roles = state.buffers.role_T[:count].tolist()
    promised = any(not role & DECIDES and not floor for role, floor in zip(roles, state.begun_with, strict=True))
    flags: dict[int, list[bool]] = {form: [] for form in (FEW, MIDDLE, MANY)}
    for layer in range(LAYERS):
        kinds = [int(table.kind_LV[layer, level]) for level in levels]
        flags[FEW].append(KIND_FULL in kinds)
        flags[MIDDLE].append(any(kind != KIND_SKIP for kind in kinds))
        shorter = KIND_SKIP in kinds or KIND_WIDTH in kinds
        flags[MANY].append(flags[MIDDLE][-1] and (promised or not shorter))
    return flags


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.thorough) for seed in range(4, 12))])
def test_levels_counts_and_flags_equal_the_plain_form(seed):
    generator = torch.Generator().manual_seed(seed)
    pick = lambda *values: values[int(torch.randint(len(values), (1,), generator=generator))]  # noqa: E731
    rule, scope, rank, count = pick("first", "accumulate"), pick("token", "token", "batch"), pick(3, 8, 19), pick(1, 2, 5, 16, 33)
    states = [make_state(rank, on_device=False), make_state(rank, on_device=True)]
    threshold = pick(0.0, 0.6, 1e9)
    candidate = None if seed % 3 == 0 else Candidate(rollout=4, share=0.5, policy=make_policy("accumulate", pick("token", "batch"), 0.7))
    for state in states:
        state.apply(make_policy(rule, scope, threshold), 1, candidate)
        if candidate is None:
            state.candidate.clear()
    poison = pick(0.0, 0.0, math.nan, math.inf)
    for _ in range(3):
        tokens = make_tokens(generator, count)
        if candidate is None:
            tokens.role_T &= ~np.uint8(OF_CANDIDATE)
        for state in states:
            state.begin_step(count, tokens)
            state.begun_with = tokens.floor_T.tolist()
        if states[1].is_active:
            check_flags(states[1], count)
        for layer in (1, 3):
            stream = torch.randn(count + 3, D, generator=generator)  # three rows of padding
            stream[0, 0] += poison
            parts = (stream - 0.25, torch.full_like(stream, 0.25)) if layer == 3 else (stream, None)
            for state in states:
                if state.is_watching():
                    state.observe(layer, *parts)
            if states[1].is_active:
                check_flags(states[1], count)
                index = states[1].index_of_layer[layer]
                risk = states[1].buffers.risk_CT[index, :count].clone()
                torch.testing.assert_close(risk, states[0].buffers.risk_CT[index, :count], rtol=1e-4, atol=1e-6, equal_nan=True)
        for name in ("level_T", "done_T", "confidence_T"):
            ours, theirs = (getattr(state.buffers, name) for state in (states[1], states[0]))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        for state in states:
            state.end_step()
        assert bool(states[1].backend.dense_GL.all()), "between steps everything runs dense"
        assert not states[1].backend._arrived.any(), "arrivals are left at 0"
        for ours, theirs in zip(states[1].sides, states[0].sides, strict=True):
            assert ours.counts_C2.tolist() == theirs.counts_C2.tolist()


def check_flags(state: State, count: int) -> None:
    for form, expected in get_flags(state, count).items():
        assert state.backend.dense_GL[form].tolist() == expected


def expect_risk(state: State, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """The risks (T,) of the first checkpoint's probe, in float64."""
    probe = {name: tensor.double() for name, tensor in state.stable.probes[0].probe.state_dict().items()}
    z = (hidden.double() + residual.double()) @ probe["down.weight"].T
    z = functional.layer_norm(z, z.shape[1:], probe["norm.weight"], probe["norm.bias"])
    return functional.softplus(z @ probe["out.weight"][0] + probe["out.bias"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.thorough), 3, pytest.param(20, marks=pytest.mark.thorough)])
def test_risks_equal_float64(dtype, count):
    state = make_state(8, on_device=True)
    state.apply(make_policy("first", "token", 0.7), 1)
    ones = np.ones(count)
    tokens = Tokens(
        role_T=(ones * DECIDES).astype(np.uint8), floor_T=(ones * 0).astype(np.uint8), goal_T=ones.astype(np.uint8),
        scale_T=ones.astype(np.float32), tier_T=(ones * 0).astype(np.int64),
    )  # fmt: skip
    for seed in range(3):
        torch.manual_seed(seed)
        state.begin_step(count, tokens)
        state.buffers.risk_CT.fill_(math.nan)  # poisoned: every risk asked for must be written
        hidden, residual = (torch.randn(count, D).mul(10 ** (seed - 1)).to(dtype) for _ in range(2))
        state.observe(1, hidden, residual)
        expected = expect_risk(state, hidden, residual)
        torch.testing.assert_close(state.buffers.risk_CT[0, :count].double(), expected, rtol=1e-5, atol=1e-6)
        state.end_step()


@pytest.mark.parametrize(
    ("count", "num_splits"), [(5, 1), (16, 5), pytest.param(40, 5, marks=pytest.mark.thorough), pytest.param(500, 1, marks=pytest.mark.thorough)]
)
def test_a_wide_stream_is_projected_in_parts(count, num_splits, monkeypatch):
    hidden_size, rank = 300, 19
    layout = Layout(num_layers=2, hidden_size=hidden_size, checkpoint_layers=(0,), probe_set="t", levels=("full", "skip"), max_rank=rank)
    probe = LREProbe(hidden_size, rank).requires_grad_(False)
    state = State(layout, {0: probe}, LevelTable(2, (), (), 64, CPU), max_num_tokens=512, device=CPU, make_backend=CudaBackend)
    num_blocks = -(-count // 16) * -(-rank // 16)
    assert count < 16 or state.backend._choose_splits(count, hidden_size, num_blocks) == min(num_splits, 264 // num_blocks, 512 // count)
    state.apply(Policy(enabled=True, checkpoints=(Checkpoint(layer=0, threshold=1e9),)), 1)
    tokens = make_tokens(torch.Generator().manual_seed(1), count)
    tokens = Tokens(
        role_T=tokens.role_T & 0 | DECIDES, floor_T=tokens.floor_T * 0, goal_T=tokens.goal_T, scale_T=tokens.scale_T, tier_T=tokens.tier_T
    )
    for seed in range(2):  # the second finds what the first has left
        torch.manual_seed(seed)
        hidden, residual = torch.randn(count, hidden_size), torch.randn(count, hidden_size)
        state.begin_step(count, tokens)
        state.backend._z_TR.fill_(math.nan)
        state.observe(0, hidden, residual)
        expected = expect_risk(state, hidden, residual)
        torch.testing.assert_close(state.buffers.risk_CT[0, :count].double(), expected, rtol=1e-5, atol=1e-6)
        state.end_step()


def test_a_swap_reaches_the_next_launch_in_place():
    state = make_state(8, on_device=True)
    state.apply(make_policy("first", "token", 0.0), 1)
    forms = state.backend
    addresses = [
        t.data_ptr() for t in (*state.buffers.tensors, forms.rules_S3, forms.dense_GL, state.stable.knobs_CK, *state.stable.probes[0].tensors)
    ]
    tokens = make_tokens(torch.Generator().manual_seed(1), 6)
    tokens.role_T[:], tokens.floor_T[:], tokens.goal_T[:], tokens.scale_T[:] = DECIDES, 0, 1, 1
    tokens = Tokens(role_T=tokens.role_T, floor_T=tokens.floor_T, goal_T=tokens.goal_T, scale_T=tokens.scale_T, tier_T=tokens.tier_T)
    seen = []
    for revision, threshold in enumerate([0.0, 1e9, 1e-9, 1e9]):
        state.apply(make_policy("first", "token", threshold), revision + 1)
        state.begin_step(6, tokens)
        state.observe(1, torch.randn(6, D))
        seen.append(int(state.level_T[:6].sum()))
        state.end_step()
    assert seen == [0, 6, 0, 6]
    now = [t.data_ptr() for t in (*state.buffers.tensors, forms.rules_S3, forms.dense_GL, state.stable.knobs_CK, *state.stable.probes[0].tensors)]
    assert addresses == now
