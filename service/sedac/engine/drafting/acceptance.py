"""How likely a draft token is to be accepted, given the draft's confidence: learned while serving.

A draft's confidence says how sure the draft is, not how often the model agrees: a draft that leaves little out is always agreed with,
whatever its confidence. So outcomes are counted by confidence, apart for greedy and sampled tokens, which verification treats differently.

Plain Python; read and written by the drafter, on the thread that runs the model.
"""

from __future__ import annotations

_NUM_BUCKETS = 16
_PRIOR = 4.0
"""Number of outcomes that the belief at the start counts for, that confidence is the acceptance."""
_MOST = 400.0
"""Most outcomes remembered of each bucket. Older ones fade."""


class Acceptance:
    """Expected acceptance by confidence, for one way of choosing tokens."""

    def __init__(self) -> None:
        self.expected = [(i + 0.5) / _NUM_BUCKETS for i in range(_NUM_BUCKETS)]
        """Expected acceptance, by bucket."""
        self._counts = [_PRIOR] * _NUM_BUCKETS

    def get(self, confidence: float) -> float:
        """Return the expected acceptance of a draft token, 0 to 1; `confidence` is 0 to 1."""
        return self.expected[_find_bucket(confidence)]

    def learn(self, confidences: list[float], num_accepted: int) -> None:
        """Take in a sequence's verified drafts: those up to the first rejection had an outcome, the others had none."""
        for i, confidence in enumerate(confidences[: num_accepted + 1]):
            bucket = _find_bucket(confidence)
            count = self._counts[bucket] = min(self._counts[bucket] + 1, _MOST)
            self.expected[bucket] += ((i < num_accepted) - self.expected[bucket]) / count


def _find_bucket(confidence: float) -> int:
    if not confidence > 0:  # NaN too
        return 0
    return min(int(confidence * _NUM_BUCKETS), _NUM_BUCKETS - 1)
