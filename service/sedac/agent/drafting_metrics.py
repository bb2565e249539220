"""Self-speculation on the engine's own /metrics: what was drafted, accepted and spent, and how the controller sees it; labels as in metrics.py.

Absent where the engine has no draft of its own; vLLM's other methods of speculation have counters of vLLM's (`vllm:spec_decode_*`).
Label sets are closed: the kind is the draft's, positions end at its length, sizes of batch are powers of two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from prometheus_client import Counter, Gauge, Histogram

from sedac.contract.stats import CONTROLLER_STATES, ControllerStats, DraftingStats
from sedac.policy.model import MAX_DRAFT_TOKENS

_LABELS = ["model_name", "engine", "kind"]


class LengthHistogram(Histogram):
    """A histogram of whole numbers that takes many at once: a step of every sequence is too many to observe one by one."""

    def add(self, counts: Sequence[int]) -> None:
        """Observe 0 counts[0] times, 1 counts[1] times and so on; the last bucket also takes what is longer than the buckets."""
        for length, count in enumerate(counts):
            if count:
                self._sum.inc(length * count)
                self._buckets[min(length, len(self._buckets) - 1)].inc(count)


_TOTALS = {
    "num_drafted": Counter("sedac_draft_tokens", "Draft tokens that were verified.", _LABELS),
    "num_accepted": Counter("sedac_draft_accepted_tokens", "Draft tokens that were accepted.", _LABELS),
    "num_passes": Counter("sedac_draft_passes", "Forward passes of the draft.", _LABELS),
    "draft_seconds": Counter("sedac_draft_seconds", "Time spent drafting.", _LABELS),
    "step_seconds": Counter("sedac_step_seconds", "Time of all steps, drafting included; pauses without requests are none.", _LABELS),
}
_AT = {
    "drafted_at": Counter("sedac_draft_tokens_at", "Draft tokens that were verified, by position; 0 is the first of a step.", [*_LABELS, "position"]),
    "accepted_at": Counter(
        "sedac_draft_accepted_at", "Draft tokens that were accepted, by position; 0 is the first of a step.", [*_LABELS, "position"]
    ),
}
_LENGTH = LengthHistogram(
    "sedac_draft_length",
    "Draft tokens verified for a sequence in a step, 0 where it generated without; 1 + accepted tokens / count is the tokens per step.",
    _LABELS,
    buckets=range(MAX_DRAFT_TOKENS + 1),
)
_GAIN = Gauge(
    "sedac_draft_controller_gain",
    "Rate of tokens with drafting to the rate without, as measured for batches of up to so many sequences; NaN: unknown.",
    [*_LABELS, "sequences"],
)
_STATE = Gauge(
    "sedac_draft_controller_state",
    "1 for the state of the controller for batches of up to so many sequences: measuring plain steps, trying drafts, drafting, or paused.",
    [*_LABELS, "sequences", "state"],
)
_SECONDS = Gauge(
    "sedac_draft_controller_seconds",
    "Moving averages for batches of up to so many sequences: a step without drafts (plain), one that verifies them (verify), a draft pass (draft).",
    [*_LABELS, "sequences", "part"],
)
_TOKENS_PER_STEP = Gauge(
    "sedac_draft_controller_tokens_per_step",
    "Output tokens of a sequence in a step that verified drafts, of late, for batches of up to so many sequences; NaN: unknown.",
    [*_LABELS, "sequences"],
)
_PARTS = {"plain": "plain_seconds", "verify": "step_seconds", "draft": "draft_pass_seconds"}


class DraftingMetrics:
    """Feeds the metrics of one engine's draft."""

    def __init__(self, *, model_name: str, engine: str = "0") -> None:
        self._engine = (model_name, engine)
        self._last: DraftingStats | None = None

    def add(self, now: DraftingStats) -> None:
        """Add what came since the last call; `now` are totals since the worker started."""
        labels, new = (*self._engine, now.kind), now.since(self._last)
        self._last = now
        for name, counter in _TOTALS.items():
            counter.labels(*labels).inc(getattr(new, name))
        for name, counter in _AT.items():
            for position, count in enumerate(getattr(new, name)):
                counter.labels(*labels, str(position)).inc(count)
        _LENGTH.labels(*labels).add(new.lengths)
        for size in now.controller:
            _show(size, (*labels, str(size.num_sequences)))


def _show(size: ControllerStats, labels: tuple[str, ...]) -> None:
    _GAIN.labels(*labels).set(size.gain or math.nan)
    _TOKENS_PER_STEP.labels(*labels).set(size.tokens_per_step or math.nan)
    for state in CONTROLLER_STATES:
        _STATE.labels(*labels, state).set(state == size.state)
    for part, name in _PARTS.items():
        _SECONDS.labels(*labels, part).set(getattr(size, name) or math.nan)
