"""The state of one worker, native kernel and plain torch, against a naive loop over tokens, checkpoints and steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sedac.engine.backends.tokens import DECIDES, OBSERVED, SOFT, Tokens
from sedac.policy.model import Adaptation, Checkpoint, Policy, Tier

from tests.engine.states import PROBES, SHARES, make_state, make_tokens

ALL_SHARES = [0.0, 1.0, *SHARES]


def soft_level(goal: int, confidence: float) -> int:
    """The most saving level, up to the goal, that the published ratio allows."""
    ratio = math.tanh(2 * confidence - 1) / 2 + 0.5
    allowed = [i for i in (2, 3, 4, 1) if ALL_SHARES[i] <= min(ratio, ALL_SHARES[goal]) + 1e-9 and (i == goal or i != 1)]
    return max(allowed, key=lambda i: ALL_SHARES[i], default=0)


@pytest.mark.parametrize("use_native", [True, False], ids=["native", "plain"])
@settings(deadline=None, max_examples=80)
@given(
    num_tokens=st.integers(0, 12),
    seed=st.integers(0, 2**31),
    thresholds=st.tuples(*[st.sampled_from([0.0, 0.4, 0.7, 1e9])] * 2),
    scope=st.sampled_from(["token", "batch"]),
    rule=st.sampled_from(["first", "accumulate"]),
    poison=st.sampled_from([0.0, 0.0, math.nan, math.inf]),
)
def test_levels_and_counts_equal_a_naive_loop(use_native, num_tokens, seed, thresholds, scope, rule, poison):
    generator = torch.Generator().manual_seed(seed)
    state = make_state(use_native)
    address = state.level_T.data_ptr()
    checkpoints = tuple(Checkpoint(layer=layer, threshold=t, weight=0.8, target=0.4) for layer, t in zip((1, 3), thresholds, strict=True))
    state.apply(Policy(enabled=True, checkpoints=checkpoints, scope=scope, rule=rule, decay=0.5), 7)
    evaluated, exited, num_decided = {1: 0, 3: 0}, {1: 0, 3: 0}, 0
    for _ in range(2):
        tokens = make_tokens(generator, num_tokens)
        decides = (tokens.role_T & DECIDES) > 0
        num_decided += int(decides.sum())
        stream = torch.randn(num_tokens + 2, 24, generator=generator)  # two rows of padding
        if num_tokens and poison:
            stream[0, 0] = poison
        state.begin_step(num_tokens, tokens)
        level, confidence, done = tokens.floor_T.tolist(), [0.0] * num_tokens, set()
        for index, (layer, threshold) in enumerate(zip((1, 3), thresholds, strict=True)):
            state.observe(layer, stream)
            if not state.is_active:
                continue
            risk = state.buffers.risk_CT[index, :num_tokens].tolist()
            candidates = [t for t in range(num_tokens) if decides[t] and t not in done and threshold > 0]
            seen = set(candidates) | {t for t in range(num_tokens) if tokens.role_T[t] & OBSERVED}
            expected = PROBES[layer](stream)[:num_tokens]
            for t in range(num_tokens):
                assert (t in seen) or math.isnan(risk[t])
                if t in seen:
                    torch.testing.assert_close(torch.tensor(risk[t]), expected[t], rtol=1e-4, atol=1e-5, equal_nan=True)
            sure = []
            for t in candidates:
                limit = float(np.float32(threshold) * tokens.scale_T[t])
                is_sure = risk[t] < limit
                if rule == "accumulate":
                    confidence[t] = confidence[t] * 0.5 + ((limit - risk[t]) / limit if is_sure else 0.0) * 0.8
                    is_sure = confidence[t] >= 0.4
                if is_sure:
                    sure.append(t)
            evaluated[layer] += len(candidates)
            if scope == "batch" and len(sure) < len(candidates):
                sure = []
            for t in sure:
                soft, goal = bool(tokens.role_T[t] & SOFT), int(tokens.goal_T[t])
                wanted = soft_level(goal, confidence[t]) if soft else goal
                if ALL_SHARES[wanted] > ALL_SHARES[level[t]]:
                    level[t] = wanted
                if not soft or level[t] == goal:
                    done.add(t)
                    exited[layer] += 1
            assert state.level_T[:num_tokens].tolist() == level
        assert not state.level_T[num_tokens:].any()
        state.end_step()
        assert not state.level_T.any()
    stats = state.get_stats()
    assert {c.layer: c.num_evaluated for c in stats.checkpoints} == evaluated
    assert {c.layer: c.num_exited for c in stats.checkpoints} == exited
    assert stats.num_decode_tokens == num_decided
    assert stats.num_mlp_blocks_computed + stats.num_mlp_blocks_skipped == 2 * num_tokens * 6
    assert (stats.num_steps, stats.num_torn_steps, stats.active_revision) == (2, 0, 7)
    assert state.level_T.data_ptr() == address


def test_a_policy_within_a_step_would_be_counted_as_torn():
    state = make_state(True)
    state.begin_step(1, None)
    state.apply(Policy(), 2)
    state.end_step()
    assert state.get_stats().num_torn_steps == 1


def test_adaptation_reaches_target_rates_and_follows_a_change_of_traffic():
    """Risks of one distribution, then of another twice as risky: the rates come back to their targets."""
    state = make_state(True)
    rates = (0.2, 0.5)
    knobs = Adaptation(enabled=True, target_exit_rates=rates, alpha=0.2, warmup_steps=4, window_tokens=256)
    checkpoints = tuple(Checkpoint(layer=layer, threshold=0.01) for layer in (1, 3))
    policy = Policy(enabled=True, checkpoints=checkpoints, adaptation=knobs, tiers=(Tier(name="balanced", threshold_scale=1.0),))
    state.apply(policy, 1)
    generator = torch.Generator().manual_seed(1)

    def run(num_steps: int, shift: float) -> list[float]:
        before = state.stable.counts_C2.clone()
        for _ in range(num_steps):
            ones = np.ones(16, dtype=np.uint8)
            tokens = Tokens(role_T=ones, floor_T=ones * 0, goal_T=ones, scale_T=ones.astype(np.float32), tier_T=ones.astype(np.int64) * 0)
            state.begin_step(16, tokens)
            stream = torch.randn(16, 24, generator=generator)
            for layer in (1, 3):
                state.observe(layer, stream + shift * PROBES[layer].down.weight[0])
            state.end_step()
        seen = (state.stable.counts_C2 - before).double()
        return (seen[:, 1] / seen[:, 0]).tolist()

    run(60, 0.0)
    assert all(abs(found - rate) < 0.05 for found, rate in zip(run(120, 0.0), rates, strict=True))
    run(60, 1.5)
    assert all(abs(found - rate) < 0.05 for found, rate in zip(run(120, 1.5), rates, strict=True))
    learned = list(state.stable.adapter.thresholds)
    frozen = Adaptation(**{**vars(knobs), "frozen": True})
    state.apply(Policy(**{**vars(policy), "adaptation": frozen}), 2)
    run(20, 0.0)
    assert state.stable.adapter.thresholds == learned
    state.apply(Policy(**{**vars(policy), "adaptation": Adaptation(**{**vars(knobs), "generation": 1})}), 3)
    assert state.stable.adapter.thresholds == pytest.approx([0.01, 0.01])


@pytest.mark.parametrize("rule", ["first", "accumulate"])
def test_repeated_passes_count_as_each_pass_on_its_own(rule):
    """The same requests go on generating: with `begin_repeat` and without, risks, exits, rates and savings are the same."""
    checkpoints = tuple(Checkpoint(layer=layer, threshold=0.6, weight=0.8, target=0.4) for layer in (1, 3))
    policy = Policy(enabled=True, checkpoints=checkpoints, rule=rule, decay=0.5)
    found = []
    for repeats in (True, False):
        state, generator, reports = make_state(True), torch.Generator().manual_seed(5), []
        state.count_requests = lambda saved_T, num_steps, reports=reports: reports.append((saved_T.tolist(), num_steps))
        state.apply(policy, 1)
        tokens = make_tokens(generator, 6)
        saved_T, levels = np.zeros(6), []
        for step in range(300):
            is_repeat = repeats and state.begin_repeat(tokens)
            assert is_repeat == (repeats and step > 0)
            if not is_repeat:
                state.begin_step(6, tokens)
            stream = torch.randn(6, 24, generator=generator)
            for layer in (1, 3):
                state.observe(layer, stream)
                levels.append(state.level_T[:6].tolist())
            state.buffers.saved_T[:6] += state.level_T[:6] > 0
            if is_repeat:
                state.end_repeat()
            else:
                saved_T += state.end_step()
            assert not state.level_T.any()
        stats, risks = state.get_stats(), state.risk_CT.copy()
        if repeats:
            assert [count for _, count in reports] == [256, 43]
            saved_T += np.sum([saved for saved, _ in reports], axis=0)
        found.append((stats, levels, saved_T.tolist(), risks))
    (stats, levels, saved, risks), (each, own_levels, own_saved, own_risks) = found
    assert levels == own_levels
    assert saved == own_saved
    np.testing.assert_array_equal(risks, own_risks)
    assert stats.num_mlp_blocks_skipped > 0
    for a, b in zip(stats.checkpoints, each.checkpoints, strict=True):
        assert (a.num_evaluated, a.num_exited) == (b.num_evaluated, b.num_exited)
        assert a.exit_rate == pytest.approx(b.exit_rate, abs=0.1), "rates of passes taken together move as far"
    assert stats.tiers == each.tiers
    assert (stats.num_steps, stats.num_tokens, stats.num_decode_tokens) == (each.num_steps, each.num_tokens, each.num_decode_tokens)


_LEARNING = {
    "sensitivity": {"sensitivity": 0.5},
    "adaptation": {"adaptation": Adaptation(enabled=True, target_exit_rates=(0.5,), warmup_steps=0)},
}


@pytest.mark.parametrize("knobs", _LEARNING.values(), ids=_LEARNING)
def test_what_learns_from_each_step_gets_each_step(knobs):
    state, generator = make_state(True), torch.Generator().manual_seed(5)
    state.apply(Policy(enabled=True, checkpoints=(Checkpoint(layer=1, threshold=0.6),), **knobs), 1)
    tokens = make_tokens(generator, 4)
    state.begin_step(4, tokens)
    state.end_step()
    assert not state.begin_repeat(tokens)


def test_steps_of_exact_requests_are_counted_to_their_tier():
    state = make_state(True)
    state.apply(Policy(enabled=True), 1)
    state.begin_plain(7)
    assert not state.is_active
    state.end_step()
    state.apply(Policy(enabled=False), 2)
    state.begin_plain(5)
    state.end_step()
    stats = state.get_stats()
    assert (stats.num_steps, stats.num_tokens, stats.num_decode_tokens, stats.num_mlp_blocks_skipped) == (2, 12, 0, 0)
    assert {tier.name: tier.num_tokens for tier in stats.tiers} == {"exact": 7, "balanced": 0}
