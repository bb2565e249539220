"""Limits on what callers ask of the service at one time: calls, streams and calls per second. What is too much is refused at once.

A caller is the principal where callers are known, else the address it calls from. Lives on the event loop.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator

from sedac.control.base.metrics import ControlMetrics
from sedac.control.base.settings import ControlSettings
from sedac.errors import LimitExceeded

_BURST_SECONDS = 2.0
_MAX_BUCKETS = 4096


class TokenBucket:
    """Lets `rate` acts per second through, and `burst` at once after a pause."""

    def __init__(self, rate: float, burst: float, now: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._now = rate, burst, now
        self._level, self._at = burst, now()

    def take(self) -> bool:
        """Whether one more act may happen now."""
        at = self._now()
        self._level = min(self._burst, self._level + (at - self._at) * self._rate)
        self._at = at
        if self._level < 1:
            return False
        self._level -= 1
        return True


class Limits:
    """The limits of one service, and what is in use."""

    def __init__(self, settings: ControlSettings, metrics: ControlMetrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._num_calls = 0
        self._streams: Counter[str] = Counter()
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    @contextlib.contextmanager
    def hold_call(self) -> Iterator[None]:
        """Count a call of anybody while the block runs.

        Raises:
            LimitExceeded: too many run.
        """
        limit = self._settings.max_calls
        if self._num_calls >= limit:
            raise self._refuse("calls", f"{limit} calls run already, which is the limit; call again later, or raise SEDAC_CONTROL_MAX_CALLS")
        self._num_calls += 1
        try:
            yield
        finally:
            self._num_calls -= 1

    @contextlib.contextmanager
    def hold_stream(self, caller: str) -> Iterator[None]:
        """Count a stream of one caller while the block runs.

        Raises:
            LimitExceeded: the caller has too many.
        """
        limit = self._settings.max_streams
        if self._streams[caller] >= limit:
            raise self._refuse(
                "streams", f"{caller} has {limit} streams already, which is the limit; end some, or raise SEDAC_CONTROL_MAX_STREAMS for all callers"
            )
        self._streams[caller] += 1
        try:
            yield
        finally:
            self._streams[caller] -= 1
            if not self._streams[caller]:
                del self._streams[caller]

    def take(self, caller: str) -> None:
        """Count one call against a caller's rate.

        Raises:
            LimitExceeded: it calls too often.
        """
        rate = self._settings.max_calls_per_second
        if not rate:
            return
        bucket = self._buckets.get(caller) or TokenBucket(rate, max(1.0, rate * _BURST_SECONDS))
        self._buckets[caller] = bucket
        self._buckets.move_to_end(caller)
        if len(self._buckets) > _MAX_BUCKETS:
            self._buckets.popitem(last=False)
        if not bucket.take():
            raise self._refuse(
                "rate",
                f"{caller} calls over {rate:g} times a second, which is the limit; slow down, or raise SEDAC_CONTROL_MAX_CALLS_PER_SECOND",
            )

    def _refuse(self, limit: str, message: str) -> LimitExceeded:
        self._metrics.limited.labels(limit).inc()
        return LimitExceeded(message)
