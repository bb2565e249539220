"""The controller in a simulated engine: it drafts where that pays, pauses where it does not, and loses little while it finds out.

The simulation knows the true cost of a step, a + v rows + d passes, and how often drafts are accepted; the controller sees times with
noise. What it loses is counted in true costs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sedac.engine.drafting.controller import Controller, Limits


@dataclass(kw_only=True)
class _Engine:
    """Costs in units of a plain step; the confidence of a draft token is drawn from a beta distribution and is also its chance."""

    num_sequences: int = 1
    row: float = 0.03
    draft_pass: float = 0.2
    acceptance: float = 0.7
    spread: float = 3.0
    """The a + b of the beta distribution of confidences."""
    noise: float = 0.05
    spikes: float = 0.005
    """Share of the steps that take five times as long."""
    overconfidence: float = 0.0
    """What confidences are beyond the chance of being accepted."""
    max_tokens: int = 4
    num_cold: int = 0
    """First steps with drafts, which take five times as long."""
    num_slow: int = 0
    """First steps that take four times as long because the machine is busy."""
    controller: Controller = field(default_factory=Controller)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def __post_init__(self) -> None:
        self.drafts: list[list[float]] = [[] for _ in range(self.num_sequences)]
        self.num_passes, self.draft_seconds = 0, 0.0

    def step(self) -> tuple[int, float]:
        """Verify what was drafted, learn, draft; returns output tokens and the true cost of the step and its drafts."""
        counts = [1 + self._count_accepted(chances) for chances in self.drafts]
        rows = sum(len(chances) + 1 for chances in self.drafts)
        cost = 1 + self.row * (rows - self.num_sequences)
        if self.num_passes and self.num_cold:
            self.num_cold -= 1
            cost *= 5
        busy = 4 if self.num_slow > 0 else 1
        self.num_slow -= 1
        true_cost = cost + self.num_passes * self.draft_pass
        self.controller.learn(
            num_sequences=self.num_sequences,
            num_rows=rows,
            num_tokens=sum(counts),
            seconds=busy * cost * self._make_noise() + self.draft_seconds,
            draft_seconds=self.draft_seconds,
            num_passes=self.num_passes,
        )
        limits = self.controller.choose(self.num_sequences, max_tokens=self.max_tokens, min_confidence=0.3, adaptive=True)
        self._draft(limits)
        return sum(counts), true_cost

    def _count_accepted(self, chances: list[float]) -> int:
        for i, chance in enumerate(chances):
            if self.rng.random() >= chance:
                return i
        return len(chances)

    def _make_noise(self) -> float:
        return float(np.exp(self.rng.normal(0, self.noise))) * (5 if self.rng.random() < self.spikes else 1)

    def _draft(self, limits: Limits) -> None:
        """The drafter's own rules."""
        self.drafts, self.num_passes = [[] for _ in range(self.num_sequences)], 0
        live, joint = list(range(self.num_sequences)), [1.0] * self.num_sequences
        confidences = []
        while live and self.num_passes < limits.max_tokens:
            self.num_passes += 1
            for i in live:
                chance = self.rng.beta(self.acceptance * self.spread, (1 - self.acceptance) * self.spread)
                confidences.append(min(1.0, chance + self.overconfidence))
                self.drafts[i].append(chance)
                joint[i] *= confidences[-1]
            live = [i for i in live if joint[i] >= limits.min_confidence]
            if sum(joint[i] for i in live) < limits.min_sum:
                break
        self.draft_seconds = self.num_passes * self.draft_pass * self._make_noise()
        if confidences:
            self.controller.learn_confidence(self.num_sequences, float(np.mean(confidences)))

    def run(self, num_tokens: int) -> np.ndarray:
        """Tokens and costs of steps (S, 2), until there are so many tokens."""
        steps, total = [], 0
        while total < num_tokens:
            steps.append(self.step())
            total += steps[-1][0]
        return np.array(steps)

    def get_speed(self, steps: np.ndarray) -> float:
        """Speed against plain steps."""
        return float(steps[:, 0].sum() / self.num_sequences / steps[:, 1].sum())

    def get_worst(self, steps: np.ndarray, num_tokens: int = 500) -> float:
        """The lowest speed over windows of so many tokens."""
        ends = np.cumsum(steps[:, 0])
        costs = np.concatenate([[0], np.cumsum(steps[:, 1])])
        tokens = np.concatenate([[0], ends])
        starts = np.arange(len(steps))
        stops = np.searchsorted(tokens, tokens[starts] + num_tokens)
        whole = stops <= len(steps)
        speeds = (tokens[stops[whole]] - tokens[starts[whole]]) / (costs[stops[whole]] - costs[starts[whole]]) / self.num_sequences
        return float(speeds.min())


_WARM_UP = 3000
"""tokens of each sequence"""
_GOOD = {"good": {"acceptance": 0.8}, "cheap": {"acceptance": 0.6, "draft_pass": 0.08}, "short": {"acceptance": 0.7, "max_tokens": 2}}
_BAD = {"wrong": {"acceptance": 0.1}, "dear": {"acceptance": 0.7, "draft_pass": 0.9}, "overconfident": {"acceptance": 0.15, "overconfidence": 0.6}}
_MIDDLING = {"middling": {"acceptance": 0.45, "draft_pass": 0.25}, "edge": {"acceptance": 0.6, "draft_pass": 0.3}}


def _always(*_, max_tokens, min_confidence, **__) -> Limits:
    return Limits(max_tokens=max_tokens, min_confidence=min_confidence)


@pytest.mark.parametrize("num_sequences", [1, 4])
@pytest.mark.parametrize("name", _GOOD)
def test_drafts_where_it_pays(name, num_sequences):
    engine, always = (_Engine(num_sequences=num_sequences, **_GOOD[name]) for _ in range(2))
    always.controller.choose = _always
    engine.run(_WARM_UP * num_sequences)
    steps = engine.run(10_000 * num_sequences)
    assert engine.get_speed(steps) > 0.97 * always.get_speed(always.run(10_000 * num_sequences))
    assert engine.get_speed(steps) > 1.2
    (stats,) = engine.controller.get_stats()
    assert stats.state in ("drafting", "measuring")
    assert stats.gain == pytest.approx(engine.get_speed(steps), rel=0.25)
    assert stats.plain_seconds == pytest.approx(1, rel=0.05)
    assert stats.draft_pass_seconds == pytest.approx(engine.draft_pass, rel=0.1)


@pytest.mark.parametrize("num_sequences", [1, 4, 16])
@pytest.mark.parametrize("name", _BAD)
def test_pauses_where_it_does_not(name, num_sequences):
    engine, always = (_Engine(num_sequences=num_sequences, **_BAD[name]) for _ in range(2))
    always.controller.choose = _always
    engine.run(_WARM_UP * num_sequences)
    steps = engine.run(10_000 * num_sequences)
    assert engine.get_speed(steps) > 0.99
    assert always.get_speed(always.run(10_000 * num_sequences)) < 0.9, "the simulation must punish drafting"
    assert engine.controller.get_stats()[0].state in ("paused", "trying")


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.thorough) for seed in (1, 2))])
@pytest.mark.parametrize("num_sequences", [1, 4, 16])
@pytest.mark.parametrize("name", [*_GOOD, *_BAD, *_MIDDLING])
def test_loses_at_most_3_percent_over_any_500_tokens_of_a_sequence(name, num_sequences, seed):
    engine = _Engine(num_sequences=num_sequences, rng=np.random.default_rng(seed), **(_GOOD | _BAD | _MIDDLING)[name])
    engine.run(_WARM_UP * num_sequences)
    steps = engine.run(10_000 * num_sequences)
    assert engine.get_worst(steps, 500 * num_sequences) > 0.97
    assert engine.get_worst(steps, 500) > 0.9, "31 steps of 16 sequences"


@pytest.mark.parametrize("num_sequences", [1, 4])
@pytest.mark.parametrize("num_cold", [1, 3])
def test_slow_first_drafts_do_not_keep_it_from_drafting(num_cold, num_sequences):
    engine = _Engine(acceptance=0.7, num_sequences=num_sequences, num_cold=num_cold, rng=np.random.default_rng(num_cold))
    engine.run(250 * num_sequences)
    assert engine.controller.get_stats()[0].state in ("drafting", "measuring")
    assert engine.get_speed(engine.run(1000 * num_sequences)) > 1.15


@pytest.mark.parametrize("num_sequences", [1, 4, 16])
@pytest.mark.parametrize("name", _BAD)
def test_a_machine_that_was_busy_at_first_makes_it_draft_for_nothing_only_briefly(name, num_sequences):
    engine = _Engine(num_sequences=num_sequences, num_slow=4, **_BAD[name])
    steps = engine.run(500 * num_sequences)
    assert all(model.gain <= max(1.0, model.tokens_per_step) for model in engine.controller.get_stats())
    assert engine.get_speed(engine.run(1000 * num_sequences)) > 0.97
    assert engine.get_speed(steps) > 0.85


def test_takes_up_drafting_again_when_it_pays_again():
    engine = _Engine(acceptance=0.1)
    engine.run(5000)
    assert engine.controller.get_stats()[0].state in ("paused", "trying")
    engine.acceptance = 0.85
    engine.run(20_000)
    assert engine.controller.get_stats()[0].state in ("drafting", "measuring")
    assert engine.get_speed(engine.run(2000)) > 1.3
    engine.acceptance = 0.1
    engine.run(2000)
    assert engine.get_speed(engine.run(3000)) > 0.98


@pytest.mark.parametrize("seed", range(8))
def test_text_that_became_easy_is_drafted_after_a_few_pauses(seed):
    engine = _Engine(acceptance=0.1, max_tokens=8, row=0.01, rng=np.random.default_rng(seed))
    engine.run(5000)
    engine.acceptance, engine.spread = 0.98, 100.0
    engine.run(1000)  # three of the longest pauses: a step that is slow by chance costs one
    assert engine.controller.get_stats()[0].state in ("drafting", "measuring")
    assert engine.get_speed(engine.run(300)) > 1.8


def test_sizes_that_share_a_model_are_compared_per_sequence():
    """9 to 16 sequences are one size: what a plain step of 9 gives says nothing about one of 16."""
    controller, rng = Controller(), np.random.default_rng(0)
    engine = _Engine(num_sequences=16, acceptance=0.75, draft_pass=0.6, controller=controller, rng=rng)
    fewer = _Engine(num_sequences=9, acceptance=0.75, draft_pass=0.6, controller=controller, rng=rng)
    for _ in range(60):
        steps = [e.run(e.num_sequences * 100) for e in (fewer, engine)]
    assert len(controller.get_stats()) == 1
    for each, own in zip((fewer, engine), steps, strict=True):
        assert each.get_speed(own) > 0.97


def test_fixed_lengths_are_left_alone():
    controller = Controller()
    for tokens in (0, 1, 4):
        assert controller.choose(3, max_tokens=tokens, min_confidence=0.2, adaptive=False) == Limits(max_tokens=tokens, min_confidence=0.2)
    assert controller.get_stats() == ()


_SECONDS = st.floats(min_value=-1.0, max_value=1e6, allow_nan=False)
_CALLS = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 16), _SECONDS, _SECONDS.map(abs), st.integers(0, 16), st.floats(0, 1), st.integers(0, 16)),
    max_size=150,
)


@given(_CALLS)
def test_whatever_it_is_told_its_limits_make_sense(calls):
    controller = Controller()
    for num_sequences, extra, seconds, draft_seconds, num_passes, confidence, max_tokens in calls:
        controller.learn(
            num_sequences=num_sequences,
            num_rows=num_sequences + extra,
            num_tokens=num_sequences + extra // 2,
            seconds=seconds,
            draft_seconds=draft_seconds,
            num_passes=num_passes,
        )
        controller.learn_confidence(num_sequences, confidence)
        limits = controller.choose(num_sequences, max_tokens=max_tokens, min_confidence=confidence, adaptive=True)
        assert limits.max_tokens in (0, max_tokens)
        assert 0 <= limits.min_confidence <= 1
        assert limits.min_sum >= 0
    for stats in controller.get_stats():
        assert stats.state in ("measuring", "trying", "drafting", "paused")
        assert np.isfinite([stats.gain, stats.plain_seconds, stats.step_seconds, stats.draft_pass_seconds, stats.tokens_per_step]).all()
        assert stats.gain >= 0
