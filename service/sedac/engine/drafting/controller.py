"""How far to draft: lengths and stopping rules from measured costs and acceptance, down to no drafting at all.

The cost of a step with B sequences, n rows to verify and m draft passes is modelled as a + v (n - B) + d m. Drafting one token
further costs d for all and v for each sequence that goes on; it wins time in proportion to the probability that the token will
count. So a sequence goes on while the product of its drafts' confidences passes `v r`, and a further pass is made while the sum of
those products passes `d r`, where r is the rate of tokens that the time would give otherwise. Whether to draft at all is decided
by the measured rates with and without. Costs depend on the number of sequences, so each power of two has its own model.

Plain Python; driven by the drafter once per step, on the thread that runs the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sedac.stats import ControllerStats

_PACE = 0.05
"""weight of the newest step in the moving averages"""
_FIRST_STEPS = 4
"""plain steps before the first draft: their cost is what drafting is held against"""
_TRIAL_STEPS = 12
_PLAIN_EVERY, _PLAIN_STEPS = 512, 2
"""while drafting pays: look again at what a plain step costs"""
_MIN_PAUSE, _MAX_PAUSE = 64, 4096
"""steps without drafting after a trial that did not pay; doubled each time"""
_MIN_GAIN = 1.01
"""drafting goes on while its rate is at least this times the plain rate"""


@dataclass
class Mean:
    """A moving average that starts as a plain mean."""

    value: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        """Take one more value in."""
        self.count += 1
        self.value += (value - self.value) * max(_PACE, 1 / self.count)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one step may draft."""

    max_tokens: int
    """per sequence; 0: none"""
    min_confidence: float
    """product of the drafts' confidences below which a sequence stops"""
    min_sum: float = 0.0
    """sum of those products over the sequences below which all stop"""


@dataclass(kw_only=True)
class Model:
    """Costs and rates of one size of batch; seconds."""

    plain: Mean = field(default_factory=Mean)
    """a step that verified nothing"""
    step: Mean = field(default_factory=Mean)
    """a step that verified drafts, without the time of drafting"""
    draft_pass: Mean = field(default_factory=Mean)
    drafted_tokens: Mean = field(default_factory=Mean)
    """output tokens of such a step"""
    drafted_seconds: Mean = field(default_factory=Mean)
    """all of such a step"""
    plain_tokens: Mean = field(default_factory=Mean)
    rows: Mean = field(default_factory=Mean)
    """rows verified beyond one per sequence"""
    confidence: Mean = field(default_factory=Mean)
    """of a draft token"""
    state: str = "measuring"
    steps_left: int = _FIRST_STEPS
    pause: int = _MIN_PAUSE

    @property
    def gain(self) -> float:
        """Rate with drafting to rate without; 0: unknown."""
        if not (self.plain.count and self.drafted_seconds.count):
            return 0.0
        plain_rate = self.plain_tokens.value / self.plain.value
        return self.drafted_tokens.value / self.drafted_seconds.value / plain_rate


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
        model = self._models.setdefault(self._last, Model())
        model.steps_left -= 1
        if model.steps_left < 0:
            self._move_on(model)
        if model.state in ("measuring", "paused"):
            return Limits(max_tokens=0, min_confidence=1.0)
        return self._make_limits(model, num_sequences, max_tokens, min_confidence)

    def _move_on(self, model: Model) -> None:
        if model.state in ("measuring", "paused"):
            model.state, model.steps_left = "trying", _TRIAL_STEPS
            model.drafted_seconds.count = min(model.drafted_seconds.count, 2)
            model.drafted_tokens.count = min(model.drafted_tokens.count, 2)
        elif model.state == "trying" and 0 < model.gain < _MIN_GAIN:
            model.state, model.steps_left = "paused", model.pause
            model.pause = min(model.pause * 2, _MAX_PAUSE)
        elif model.state == "trying":
            model.state, model.steps_left, model.pause = "drafting", _PLAIN_EVERY, _MIN_PAUSE
        else:
            model.state, model.steps_left = "measuring", _PLAIN_STEPS

    def _make_limits(self, model: Model, num_sequences: int, max_tokens: int, min_confidence: float) -> Limits:
        if not (model.plain.value and model.draft_pass.count and model.step.count):
            return Limits(max_tokens=max_tokens, min_confidence=min_confidence)
        plain_rate = model.plain_tokens.value / model.plain.value
        rate = max(plain_rate, model.drafted_tokens.value / model.drafted_seconds.value if model.drafted_seconds.value else 0.0)
        per_row = max(0.0, model.step.value - model.plain.value) / max(1.0, model.rows.value)
        confidence = min(1.0, max(0.05, model.confidence.value))
        return Limits(
            max_tokens=max_tokens,
            min_confidence=min(1.0, per_row * rate / confidence),
            min_sum=(model.draft_pass.value + per_row) * rate / confidence,
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
            model.plain.add(min(seconds, 3 * model.plain.value) if model.plain.count > 3 else seconds)
            model.plain_tokens.add(num_tokens)
        elif extra > 0:
            usual = model.drafted_seconds.value
            bounded = min(seconds, 3 * usual) if model.drafted_seconds.count > 3 else seconds
            model.step.add(max(0.0, bounded - draft_seconds))
            model.drafted_seconds.add(bounded)
            model.drafted_tokens.add(num_tokens)
            model.rows.add(extra)
        if num_passes:
            model.draft_pass.add(draft_seconds / num_passes)
        if model.state == "drafting" and model.drafted_seconds.count > 3 * _TRIAL_STEPS and 0 < model.gain < _MIN_GAIN:
            model.state, model.steps_left = "paused", model.pause

    def learn_confidence(self, num_sequences: int, confidence: float) -> None:
        """Take in the mean confidence of a step's draft tokens."""
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
                plain_seconds=model.plain.value,
                step_seconds=model.step.value,
                draft_pass_seconds=model.draft_pass.value,
                tokens_per_step=model.drafted_tokens.value / size if size else 0.0,
            )
            for size, model in sorted(self._models.items())
        )


def _get_size(num_sequences: int) -> int:
    return 1 << max(0, num_sequences - 1).bit_length()
