"""Two sides in one state: each decides as if it were alone, by its own knobs and probes, native kernel and plain torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sedac.engine.backends.tokens import DECIDES, OF_CANDIDATE, Tokens
from sedac.engine.step.probe_sets import Loaded
from sedac.engine.step.state import State
from sedac.policy.layout import ProbeSetSummary
from sedac.policy.model import Adaptation, Candidate, Checkpoint, Policy
from sedac.probe.probe import LREProbe

from tests.engine.states import LAYOUT, PROBES, make_state, make_tokens

torch.manual_seed(7)
SETS = {"small": {1: LREProbe(24, 3), 3: LREProbe(24, 3)}, "largest": {1: LREProbe(24, 11), 3: LREProbe(24, 11)}, "one": {3: LREProbe(24, 5)}}
NATIVE = pytest.mark.parametrize("use_native", [True, False], ids=["native", "plain"])


def make_state_with_sets(use_native: bool) -> State:
    state = make_state(use_native)
    for name, probes in SETS.items():
        add_set(state, name, probes)
    return state


def add_set(state: State, name: str, probes: dict[int, LREProbe]) -> None:
    """Put a set in as if it had been preloaded from a directory, which test_probe_sets.py does."""
    from sedac.engine.step.probe_sets import _Entry

    rank = next(iter(probes.values())).down.out_features
    summary = ProbeSetSummary(name=name, sha256=name, size_bytes=1, num_layers=6, hidden_size=24, rank=rank, checkpoint_layers=tuple(probes))
    state.probe_sets._entries[name] = _Entry(state="ready", summary=summary, loaded=Loaded(sha256=name, probes=probes))


def make_policy(probe_set: str, thresholds: tuple[float, ...], **knobs) -> Policy:
    layers = SETS[probe_set] if probe_set else PROBES
    checkpoints = tuple(Checkpoint(layer=layer, threshold=t, weight=0.8, target=0.4) for layer, t in zip((1, 3), thresholds, strict=True))
    return Policy(enabled=True, probe_set=probe_set, checkpoints=tuple(c for c in checkpoints if c.layer in layers), **knobs)


def select(tokens: Tokens, mine_T: np.ndarray) -> Tokens:
    role_T = tokens.role_T[mine_T] & ~np.uint8(OF_CANDIDATE)
    return Tokens(role_T=role_T, **{name: getattr(tokens, name)[mine_T] for name in ("floor_T", "goal_T", "scale_T", "tier_T")})


def run(state: State, steps: list[tuple[Tokens, torch.Tensor]]) -> list[tuple[list[list[int]], np.ndarray, np.ndarray]]:
    """Levels after each checkpoint, risks and whether decided, by step."""
    results = []
    for tokens, stream_TD in steps:
        num_tokens = len(tokens.role_T)
        state.begin_step(num_tokens, tokens)
        levels = []
        for layer in LAYOUT.checkpoint_layers:
            state.observe(layer, stream_TD)
            levels.append(state.level_T[:num_tokens].tolist())
        risk_CT, done_T = state.buffers.risk_CT[:, :num_tokens].numpy().copy(), state.buffers.done_T[:num_tokens].numpy().copy()
        state.end_step()
        results.append((levels, risk_CT, done_T))
    return results


POLICIES = st.builds(
    make_policy,
    st.sampled_from(["", *SETS]),
    st.tuples(*[st.sampled_from([0.0, 0.5, 0.7, 1e9])] * 2),
    scope=st.sampled_from(["token", "batch"]),
    rule=st.sampled_from(["first", "accumulate"]),
    decay=st.sampled_from([0.5, 0.9]),
)


@NATIVE
@settings(deadline=None, max_examples=60)
@given(num_tokens=st.integers(0, 12), seed=st.integers(0, 2**31), policy=POLICIES, candidate=POLICIES)
def test_each_side_decides_as_if_it_were_alone(use_native, num_tokens, seed, policy, candidate):
    generator = torch.Generator().manual_seed(seed)
    steps = []
    for _ in range(2):
        tokens = make_tokens(generator, num_tokens)
        side_T = torch.randint(2, (num_tokens,), generator=generator).numpy().astype(np.uint8) * np.uint8(OF_CANDIDATE)
        tokens = replace(tokens, role_T=np.where(tokens.role_T > 0, tokens.role_T | side_T, tokens.role_T))
        steps.append((tokens, torch.randn(num_tokens + 2, 24, generator=generator)))
    both = make_state_with_sets(use_native)
    both.apply(policy, 4, Candidate(rollout=9, policy=candidate, share=0.5))
    together = run(both, steps)
    for side, own in ((both.stable, policy), (both.candidate, candidate)):
        alone = make_state_with_sets(use_native)
        alone.apply(own, 1)
        masks = [tokens.role_T & OF_CANDIDATE == side.role for tokens, _ in steps]
        mine = [(select(tokens, m), stream[np.append(m, [True, True])]) for (tokens, stream), m in zip(steps, masks, strict=True)]
        for (levels, risk, done), (own_levels, own_risk, own_done), mine_T in zip(together, run(alone, mine), masks, strict=True):
            assert [np.array(level)[mine_T].tolist() for level in levels] == own_levels
            assert done[mine_T].tolist() == own_done.tolist()
            if side.has_thresholds:  # else it may have been looked at for nothing
                compare = np.testing.assert_array_equal if use_native else np.testing.assert_allclose
                compare(risk[:, mine_T], own_risk, **({} if use_native else {"rtol": 1e-5, "atol": 1e-6}))
        assert torch.equal(side.counts_C2, alone.stable.counts_C2)
    stats = both.get_stats()
    assert (stats.active_revision, stats.active_rollout, stats.num_torn_steps) == (4, 9, 0)
    assert [c.num_exited for c in stats.checkpoints] == (both.stable.counts_C2 + both.candidate.counts_C2)[:, 1].tolist()


@NATIVE
@pytest.mark.parametrize("name", SETS)
def test_a_swap_computes_the_new_probes_where_the_old_ones_were(use_native, name):
    state = make_state_with_sets(use_native)

    def find_addresses() -> list[int]:
        return [t.data_ptr() for side in (state.stable, state.candidate) for p in side.probes for t in (*p.tensors, p.rank)]

    addresses, stream = find_addresses(), torch.randn(16, 24)
    ones = np.ones(16, dtype=np.uint8)
    tokens = Tokens(role_T=ones * DECIDES, floor_T=ones * 0, goal_T=ones, scale_T=ones.astype(np.float32), tier_T=ones.astype(np.int64) * 0)
    for revision, (wanted, probes) in enumerate([("", PROBES), (name, SETS[name]), ("", PROBES)]):
        state.apply(make_policy(wanted, (1e-9, 1e-9)), revision)  # nobody is that sure, so every checkpoint sees all
        for _, risk, _ in run(state, [(tokens, stream)]):
            for i, layer in enumerate(LAYOUT.checkpoint_layers):
                expected = probes[layer](stream) if layer in probes else torch.full((16,), float("nan"))
                torch.testing.assert_close(torch.from_numpy(risk[i]), expected.detach(), rtol=1e-4, atol=1e-5, equal_nan=True)
    assert find_addresses() == addresses


def test_an_ended_roll_out_leaves_the_stable_side_alone():
    state, stream = make_state_with_sets(True), torch.randn(4, 24)
    both = np.array([DECIDES, DECIDES | OF_CANDIDATE] * 2, dtype=np.uint8)
    tokens = Tokens(role_T=both, floor_T=both * 0, goal_T=both * 0 + 1, scale_T=both / both, tier_T=both.astype(np.int64) * 0)
    state.apply(make_policy("", (1e9, 0.0)), 1, Candidate(rollout=3, policy=make_policy("small", (0.0, 0.0)), share=0.1))
    assert run(state, [(tokens, stream)])[0][0][1] == [1, 0, 1, 0]
    state.apply(make_policy("", (1e9, 0.0)), 1)
    assert (state.rollout, state.get_stats().active_rollout) == (0, 0)
    assert state.get_side(3) is state.stable
    assert run(state, [(replace(tokens, role_T=both & ~np.uint8(OF_CANDIDATE)), stream)])[0][0][1] == [1, 1, 1, 1]


def test_a_change_of_the_candidate_within_a_step_would_be_counted_as_torn():
    state = make_state(True)
    state.apply(Policy(), 1)
    state.begin_step(1, None)
    state.apply(Policy(), 1, Candidate(rollout=1, policy=Policy(), share=0.5))
    state.end_step()
    assert state.get_stats().num_torn_steps == 1


def test_each_side_adapts_to_its_own_tokens_and_a_promotion_keeps_what_was_learned():
    state = make_state_with_sets(True)
    knobs = Adaptation(enabled=True, alpha=0.2, warmup_steps=4, window_tokens=256)
    rates = {"stable": (0.2, 0.5), "candidate": (0.6, 0.1)}
    policy = make_policy("", (0.01, 0.01), adaptation=replace(knobs, target_exit_rates=rates["stable"]))
    other = make_policy("small", (0.01, 0.01), adaptation=replace(knobs, target_exit_rates=rates["candidate"]))
    candidate = Candidate(rollout=1, policy=other, share=0.5)
    state.apply(policy, 1, candidate)
    generator = torch.Generator().manual_seed(1)
    ones = np.ones(16, dtype=np.uint8)
    role_T = np.where(np.arange(16) % 2, DECIDES | OF_CANDIDATE, DECIDES).astype(np.uint8)
    tokens = Tokens(role_T=role_T, floor_T=ones * 0, goal_T=ones, scale_T=ones.astype(np.float32), tier_T=ones.astype(np.int64) * 0)

    def measure(num_steps: int) -> dict[str, list[float]]:
        before = {"stable": state.stable.counts_C2.clone(), "candidate": state.candidate.counts_C2.clone()}
        run(state, [(tokens, torch.randn(16, 24, generator=generator)) for _ in range(num_steps)])
        seen = {name: (getattr(state, name).counts_C2 - counts).double() for name, counts in before.items()}
        return {name: (counts[:, 1] / counts[:, 0]).tolist() for name, counts in seen.items()}

    measure(80)
    for name, found in measure(300).items():
        assert all(abs(rate - target) < 0.05 for rate, target in zip(found, rates[name], strict=True)), (name, found)
    learned = {"stable": list(state.stable.adapter.thresholds), "candidate": list(state.candidate.adapter.thresholds)}
    state.apply(policy, 1, replace(candidate, share=0.9))
    assert state.candidate.adapter.thresholds == learned["candidate"], "another share forgets nothing"
    state.apply(other, 2)
    assert state.stable.adapter.thresholds == learned["candidate"]
    assert state.stable.knobs_CK[:, 0].tolist() == pytest.approx(learned["candidate"])
    state.apply(other, 2, Candidate(rollout=2, policy=policy, share=0.1))
    assert state.candidate.adapter.thresholds == pytest.approx([0.01, 0.01]), "a roll-out starts from its policy"
    add_set(state, "largest", SETS["largest"])
    state.apply(replace(other, probe_set="largest"), 3)
    assert state.stable.adapter.thresholds == pytest.approx([0.01, 0.01]), "other probes, other risks"
