"""The state of one worker against a naive loop over tokens: random streams, thresholds, exits and steps."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sedac.engine.state import State
from sedac.policy import Checkpoint, Layout, Policy
from sedac.probe.probe import LREProbe

LAYOUT = Layout(num_layers=6, hidden_size=8, checkpoint_layers=(1, 3), probe_set="t")
torch.manual_seed(0)
PROBES = {layer: LREProbe(8, 4).requires_grad_(False) for layer in LAYOUT.checkpoint_layers}


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 12),
    st.integers(0, 2**31),
    st.tuples(*[st.sampled_from([0.0, 0.4, 0.7, 1e9])] * 2),
    st.sampled_from(["token", "batch"]),
    st.booleans(),
)
def test_exits_and_counts_equal_a_naive_loop(num_tokens, seed, thresholds, scope, enabled):
    generator = torch.Generator().manual_seed(seed)
    state = State(LAYOUT, PROBES, max_num_tokens=16, device=torch.device("cpu"))
    address = state.exited_T.data_ptr()
    checkpoints = tuple(Checkpoint(layer=layer, threshold=t) for layer, t in zip((1, 3), thresholds, strict=True))
    state.apply(Policy(enabled=enabled, checkpoints=checkpoints, scope=scope), 7)
    totals = {"evaluated": {1: 0, 3: 0}, "exited": {1: 0, 3: 0}, "skipped": 0}
    num_allowed = 0
    for _ in range(2):
        may_exit = torch.rand(num_tokens, generator=generator) < 0.7
        num_allowed += int(may_exit.sum()) if enabled else 0
        hidden, residual = (torch.randn(num_tokens + 2, 8, generator=generator) for _ in range(2))  # two rows of padding
        state.begin_step(num_tokens, may_exit if enabled else None)
        gone = set()
        for layer, threshold in zip((1, 3), thresholds, strict=True):
            state.observe(layer, hidden + residual)
            candidates = [t for t in range(num_tokens) if may_exit[t] and t not in gone]
            if enabled and threshold > 0:
                risks = {t: PROBES[layer]((hidden + residual)[t : t + 1]).item() for t in candidates}
                confident = {t for t, risk in risks.items() if risk < threshold}
                if scope == "batch" and len(confident) < len(candidates):
                    confident = set()
                totals["evaluated"][layer] += len(candidates)
                totals["exited"][layer] += len(confident)
                totals["skipped"] += len(confident) * (5 - layer)
                gone |= confident
            assert set(state.exited_T.nonzero().flatten().tolist()) == gone
            kept = range(num_tokens) if state.kept_rows is None else state.kept_rows.tolist()
            assert list(kept) == [t for t in range(num_tokens) if t not in gone]
        state.end_step()
        assert not state.exited_T.any()
    stats = state.get_stats()
    assert {c.layer: c.num_evaluated for c in stats.checkpoints} == totals["evaluated"]
    assert {c.layer: c.num_exited for c in stats.checkpoints} == totals["exited"]
    assert stats.num_decode_tokens == num_allowed
    assert stats.num_mlp_blocks_skipped == totals["skipped"]
    assert stats.num_mlp_blocks_computed + stats.num_mlp_blocks_skipped == 2 * num_tokens * 6
    assert (stats.num_steps, stats.num_torn_steps, stats.active_revision) == (2, 0, 7)
    assert state.exited_T.data_ptr() == address


def test_a_policy_within_a_step_would_be_counted_as_torn():
    state = State(LAYOUT, PROBES, max_num_tokens=4, device=torch.device("cpu"))
    state.begin_step(1, None)
    state.apply(Policy(), 2)
    state.end_step()
    assert state.get_stats().num_torn_steps == 1
