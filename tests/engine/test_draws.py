"""Draft tokens come from the distribution that is reported for them, which is all that the rejection step asks; and totals add up."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sedac.engine.backends.cpu import CpuBackend, load
from sedac.engine.backends.torch import TorchBackend
from sedac.engine.drafting.acceptance import Acceptance
from sedac.engine.drafting.draws import Draws, draw, make_generator
from sedac.engine.drafting.totals import Totals

pytestmark = pytest.mark.engine

_VOCABULARY, _NUM = 60, 40_000


def _make_logits() -> torch.Tensor:
    return torch.randn(_VOCABULARY, generator=torch.Generator().manual_seed(2)) * 2


def _make_draws(num: int, temperature: float, top_k: int | None = None, top_p: float | None = None, seeds: range | None = None) -> Draws:
    return Draws(
        temperature_N=torch.full((num,), temperature),
        top_k_N=None if top_k is None else torch.full((num,), top_k),
        top_p_N=None if top_p is None else torch.full((num,), top_p),
        generators={i: make_generator(seed, torch.device("cpu")) for i, seed in enumerate(seeds or ())},
    )


@pytest.mark.parametrize(
    "knobs",
    [{"temperature": 0.7}, {"temperature": 1.3, "top_k": 5}, {"temperature": 1.0, "top_p": 0.8}, {"temperature": 0.9, "top_k": 9, "top_p": 0.7}],
)
@pytest.mark.parametrize("seeded", [False, True])
def test_tokens_come_from_the_reported_distribution(knobs, seeded):
    torch.manual_seed(1)
    num = _NUM // 10 if seeded else _NUM
    logits = _make_logits()
    tokens, confidences, probs = draw(logits.repeat(num, 1), _make_draws(num, **knobs, seeds=range(num) if seeded else None))
    assert torch.equal(probs, probs[:1].expand_as(probs))
    expected = probs[0].double().numpy()
    support = expected > 0
    counts = np.bincount(tokens.numpy(), minlength=_VOCABULARY)
    assert counts[~support].sum() == 0
    assert stats.chisquare(counts[support], expected[support] / expected.sum() * num).pvalue > 1e-4
    assert torch.allclose(confidences, logits.softmax(-1)[tokens])

    kept = sorted(logits.tolist(), reverse=True)
    assert support.sum() <= knobs.get("top_k", _VOCABULARY)
    if "top_p" not in knobs:
        assert support.sum() == knobs.get("top_k", _VOCABULARY)
    best = torch.tensor(kept[: int(support.sum())]) / knobs["temperature"]
    assert torch.allclose(torch.from_numpy(np.sort(expected[support])[::-1].copy()).float(), best.softmax(-1), atol=1e-6)


@pytest.mark.parametrize("backend", [TorchBackend, CpuBackend])
def test_greedy_sequences_take_the_best_beside_sampled_ones(backend):
    assert load(), "build the kernels first: make setup"
    logits = torch.stack([_make_logits().roll(i) for i in range(4)])
    tokens, confidences, probs = draw(logits, None, pick=functools.partial(backend.pick, None))
    assert torch.equal(tokens, logits.argmax(-1))
    assert torch.allclose(confidences, logits.softmax(-1).amax(-1))
    assert probs is None
    draws = _make_draws(4, 1.0)
    draws.temperature_N[::2] = 0
    for _ in range(20):
        mixed, _, _ = draw(logits, draws)
        assert torch.equal(mixed[::2], tokens[::2])


def test_seeds_decide_and_stay_with_their_sequence():
    logits = torch.zeros(6, 1000)
    first, _, _ = draw(logits, _make_draws(6, 1.0, seeds=range(6)))
    again, _, _ = draw(logits, _make_draws(6, 1.0, seeds=range(6)))
    assert torch.equal(first, again)
    assert len(set(first.tolist())) > 3
    kept = _make_draws(6, 1.0, seeds=range(6)).keep([1, 4])
    assert torch.equal(draw(logits[:2], kept)[0], first[[1, 4]])
    # not vLLM's own stream for that seed, from which verification draws
    noise = [torch.empty(1000).exponential_(generator=g) for g in (make_generator(3, torch.device("cpu")), torch.Generator().manual_seed(3))]
    assert not torch.equal(*noise)


def test_parameters_are_read_at_their_rows():
    batch = SimpleNamespace(
        all_greedy=False, temperature=torch.tensor([0.0, 0.5, 0.9, 0.0]), top_k=torch.tensor([1, 2, 3, 4]), top_p=torch.tensor([0.1, 0.2, 0.3, 0.4])
    )
    draws = Draws.from_batch(batch, [1, 3], 4, {})
    assert draws.temperature_N.tolist() == [0.5, 0.0]
    assert draws.top_k_N.tolist() == [2, 4]
    assert draws.top_p_N.tolist() == pytest.approx([0.2, 0.4])
    assert Draws.from_batch(batch, [0, 3], 4, {}) is None
    assert Draws.from_batch(SimpleNamespace(all_greedy=True), [0], 1, {}) is None


@given(st.lists(st.lists(st.integers(0, 4).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), max_size=8), max_size=30))
def test_totals_add_up(steps):
    totals = Totals(4)
    for step in steps:
        totals.count_verified(step)
        totals.count_drafting(2, 0.5)
        totals.count_step(1.0)
    found = totals.get_stats("adapter", ())
    pairs = [pair for step in steps for pair in step]
    assert found.num_drafted == sum(drafted for drafted, _ in pairs)
    assert found.num_accepted == sum(accepted for _, accepted in pairs) == sum(found.accepted_at)
    assert sum(found.lengths) == len(pairs)
    assert found.num_verified_steps == sum(drafted > 0 for drafted, _ in pairs)
    assert list(found.accepted_at) == sorted(found.accepted_at, reverse=True)
    assert (found.num_passes, found.draft_seconds, found.step_seconds) == (2 * len(steps), 0.5 * len(steps), 1.0 * len(steps))


def test_acceptance_is_learned_by_confidence_up_to_the_first_rejection():
    acceptance, rng = Acceptance(), np.random.default_rng(0)
    assert acceptance.get(0.5) == pytest.approx(0.5, abs=0.04), "believed at first"
    for _ in range(4000):  # this draft is too sure where it is sure, and better than it thinks where it is not
        confidences = [float(rng.choice([0.95, 0.3])) for _ in range(3)]
        outcomes = [rng.random() < (0.6 if c > 0.5 else 0.8) for c in confidences]
        acceptance.learn(confidences, next((i for i, accepted in enumerate(outcomes) if not accepted), 3))
    assert acceptance.get(0.95) == pytest.approx(0.6, abs=0.08)
    assert acceptance.get(0.3) == pytest.approx(0.8, abs=0.08)
    assert acceptance.get(0.6) == pytest.approx(0.6, abs=0.04), "nothing was learned there"


_CONFIDENCE = st.floats(-1e-6, 1 + 1e-6) | st.just(float("nan"))


@given(st.lists(st.tuples(st.lists(_CONFIDENCE, max_size=6), st.integers(0, 6)), max_size=30), _CONFIDENCE)
def test_expected_acceptance_is_a_probability(steps, asked):
    acceptance = Acceptance()
    for confidences, accepted in steps:
        acceptance.learn(confidences, min(accepted, len(confidences)))
    assert 0 <= acceptance.get(asked) <= 1
