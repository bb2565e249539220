"""How far to draft: lengths and stopping rules from measured costs and acceptance, down to no drafting at all.

The cost of a step with B sequences, n rows to verify and m draft passes is modelled as a + v (n - B) + d m. Drafting one token
further costs d for all and v for each sequence that goes on; it wins time in proportion to the probability that the token will
count. So a sequence goes on while the product of its drafts' expected acceptances passes `v r`, and a further pass is made while the sum of
those products passes `d r`, where r is the rate of tokens that the time would give otherwise. Whether to draft at all is decided
by the measured rates with and without, per sequence. Costs depend on the number of sequences, so each power of two has its own model.

What is found out late costs little: drafts that did not pay are tried again one step at a time, so far apart that no stretch of
output notices, and a slow step now and then says nothing of the others. A step that pays is followed by another one, so that text
which has become easy is drafted at once.

Plain Python; driven by the drafter once per step, on the thread that runs the model.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from sedac.contract.stats import ControllerStats

_PACE = 0.02
"""Weight of the newest step in the moving averages."""
_FIRST_STEPS = 4
"""Plain steps before the first draft. Drafting is held against their cost."""
_TRIAL_STEPS, _MIN_TRIAL_STEPS = 12, 4
"""Steps of a trial with one sequence, and the least with more sequences, which need fewer steps."""
_PLAIN_EVERY, _PLAIN_STEPS = 256, 1
"""While drafting pays: steps until the cost of plain steps is looked at again, and plain steps of such a look."""
_PLAIN_KEPT = 15
_MIN_PAUSE, _MAX_PAUSE = 40, 320
"""Pause after a trial that did not pay, in steps: first and longest, doubled each time. The first is made again whole, as first drafts are slow."""
_COLD_STEPS = 1
"""Number of first steps of a size that verify drafts and are left out of the costs."""
_MIN_GAIN, _LEAST_GAIN = 1.08, 1.04
"""Drafting begins where its rate is at least the first times the plain rate, and goes on until it is below the second. They are above 1 because
tokens that come several at once cost the server more than the worker sees."""


@dataclass
class Mean:
    """A moving average that starts as a plain mean."""

    value: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        """Take one more value in."""
        self.count += 1
        self.value += (value - self.value) * max(_PACE, 1 / self.count)


@dataclass
class Usual:
    """The mean of the middle half of the latest values."""

    values: deque[float] = field(default_factory=lambda: deque(maxlen=_PLAIN_KEPT))

    @property
    def count(self) -> int:
        """How many values are known."""
        return len(self.values)

    @property
    def value(self) -> float:
        """0 where none is known."""
        cut = len(self.values) // 4
        middle = sorted(self.values)[cut : len(self.values) - cut]
        return sum(middle) / len(middle) if middle else 0.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one step may draft."""

    max_tokens: int
    """Limit of draft tokens per sequence. 0 means none."""
    min_confidence: float
    """A sequence stops when the product of its drafts' confidences falls below it."""
    min_sum: float = 0.0
    """All sequences stop when the sum of those products over the sequences falls below it."""
    is_adaptive: bool = False
    """Whether the products are of expected acceptances (acceptance.py), not of confidences as they are."""


@dataclass(kw_only=True)
class Model:
    """Costs and rates of one size of batch; seconds."""

    num_trials: int
    """Number of steps of a trial."""
    plain: Usual = field(default_factory=Usual)
    """Seconds of a step that verified nothing, which gives each sequence one token."""
    step: Mean = field(default_factory=Mean)
    """Seconds of a step that verified drafts, without the time of drafting."""
    draft_pass: Mean = field(default_factory=Mean)
    drafted_tokens: Mean = field(default_factory=Mean)
    """Output tokens of a sequence in such a step."""
    drafted_seconds: Mean = field(default_factory=Mean)
    """Seconds of all of such a step."""
    rows: Mean = field(default_factory=Mean)
    """Rows verified beyond one per sequence."""
    confidence: Mean = field(default_factory=Mean)
    """Expected acceptance of a draft token."""
    state: str = "measuring"
    steps_left: int = _FIRST_STEPS
    pause: int = _MIN_PAUSE // 2
    cold_steps_left: int = _COLD_STEPS
    trials_left: int = 0
    """Steps left of the next trial. After a trial that did not pay they are made one at a time, and go on as long as they pay."""
    last_gain: float = 0.0
    """The gain of the latest step that verified drafts, alone. 0 where a trial's step had none to verify."""

    @property
    def plain_seconds(self) -> float:
        """Seconds of a plain step: no more than a step takes that verifies drafts beside, so that a busy machine's slow steps pass. 0: unknown."""
        return min(self.plain.value, self.step.value) if self.plain.count and self.step.count else self.plain.value

    @property
    def gain(self) -> float:
        """Rate with drafting to rate without, at most the tokens of a step; 0: unknown."""
        if not (self.plain.count and self.drafted_seconds.count):
            return 0.0
        return self.drafted_tokens.value / self.drafted_seconds.value * self.plain_seconds


class Controller:
    """Chooses `Limits` for each step and learns from what the step took."""

    def __init__(self) -> None:
        self._models: dict[int, Model] = {}
        self._last = 0

    def choose(self, num_sequences: int, *, max_tokens: int, min_confidence: float, adaptive: bool) -> Limits:
        """Return what the next drafts may be, for `num_sequences` that may draft."""
        if not adaptive or max_tokens == 0:
            return Limits(max_tokens=max_tokens, min_confidence=min_confidence)
        self._last = _get_size(num_sequences)
        model = self._models.setdefault(self._last, Model(num_trials=max(_MIN_TRIAL_STEPS, _TRIAL_STEPS // self._last)))
        model.steps_left -= 1
        if model.steps_left < 0:
            self._move_on(model)
        if model.state in ("measuring", "paused"):
            return Limits(max_tokens=0, min_confidence=1.0)
        return self._make_limits(model, num_sequences, max_tokens, min_confidence)

    def _move_on(self, model: Model) -> None:
        if model.state == "measuring":
            is_new = not model.drafted_seconds.count
            model.state, model.steps_left = ("trying", model.num_trials) if is_new else ("drafting", _PLAIN_EVERY)
        elif model.state == "drafting":
            model.state, model.steps_left = "measuring", _PLAIN_STEPS
        elif model.state == "paused":
            self._try(model, model.trials_left if model.pause == _MIN_PAUSE else 1)
        elif model.trials_left > 0 and model.pause > _MIN_PAUSE:
            if model.last_gain >= _MIN_GAIN:
                self._try(model, 1)
            else:
                model.state, model.steps_left = "paused", model.pause
        elif model.gain >= _MIN_GAIN:
            model.state, model.steps_left, model.pause = "drafting", _PLAIN_EVERY, _MIN_PAUSE
        else:
            self._pause(model, min(model.pause * 2, _MAX_PAUSE))

    def _try(self, model: Model, num_steps: int) -> None:
        model.state, model.steps_left, model.last_gain = "trying", num_steps - 1, 0.0
        model.trials_left -= num_steps

    def _pause(self, model: Model, pause: int) -> None:
        model.state, model.steps_left, model.pause, model.trials_left = "paused", pause, pause, model.num_trials
        for mean in (model.drafted_seconds, model.drafted_tokens, model.step, model.rows, model.confidence):
            mean.count = 0 if pause == _MIN_PAUSE else min(mean.count, 2)  # after a short pause the whole trial is made again

    def _make_limits(self, model: Model, num_sequences: int, max_tokens: int, min_confidence: float) -> Limits:
        if not (model.plain_seconds and model.draft_pass.count and model.step.count):
            return Limits(max_tokens=max_tokens, min_confidence=min_confidence, is_adaptive=True)
        rate = num_sequences * max(1.0, model.gain) / model.plain_seconds
        per_row = (model.step.value - model.plain_seconds) / max(1.0, model.rows.value)
        confidence = min(1.0, max(0.05, model.confidence.value))
        return Limits(
            max_tokens=max_tokens,
            min_confidence=min(1.0, per_row * rate / confidence),
            min_sum=(model.draft_pass.value + per_row) * rate / confidence,
            is_adaptive=True,
        )

    def learn(self, *, num_sequences: int, num_rows: int, num_tokens: int, seconds: float, draft_seconds: float, num_passes: int) -> None:
        """Take in a step of generated tokens alone: `num_sequences` gave `num_tokens` from `num_rows` rows in `seconds`.

        `draft_seconds` of them went into `num_passes` draft passes that made this step's drafts or the next one's.
        """
        model = self._models.get(_get_size(num_sequences))
        if model is None or seconds <= 0:
            return
        extra = num_rows - num_sequences
        if extra == 0 and num_passes == 0:
            model.plain.values.append(seconds)
        elif extra > 0 and model.cold_steps_left:
            model.cold_steps_left -= 1
        elif extra > 0:
            usual = model.drafted_seconds.value
            bounded = min(seconds, 3 * usual) if model.drafted_seconds.count > 3 else seconds
            model.step.add(max(0.0, bounded - draft_seconds))
            model.drafted_seconds.add(bounded)
            model.drafted_tokens.add(num_tokens / num_sequences)
            model.rows.add(extra)
            model.last_gain = num_tokens / num_sequences / seconds * model.plain_seconds
        if num_passes:
            model.draft_pass.add(draft_seconds / num_passes)
        if model.state == "drafting" and model.drafted_seconds.count > 3 * model.num_trials and model.gain < _LEAST_GAIN:
            self._pause(model, _MIN_PAUSE)

    def learn_confidence(self, num_sequences: int, confidence: float) -> None:
        """Take in the mean expected acceptance of a step's draft tokens."""
        model = self._models.get(_get_size(num_sequences))
        if model is not None:
            model.confidence.add(confidence)

    def get_stats(self) -> tuple[ControllerStats, ...]:
        """Return what is known of each size of batch."""
        return tuple(
            ControllerStats(
                num_sequences=size,
                state=model.state,
                gain=model.gain,
                plain_seconds=model.plain_seconds,
                step_seconds=model.step.value,
                draft_pass_seconds=model.draft_pass.value,
                tokens_per_step=model.drafted_tokens.value,
            )
            for size, model in sorted(self._models.items())
        )


def _get_size(num_sequences: int) -> int:
    return 1 << max(0, num_sequences - 1).bit_length()
