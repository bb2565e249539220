"""Time what is replayed: medians over rounds in which variants take turns, each replay of a millisecond at least.

Inputs and weights do not fit the L2 (kernels.py). On a GPU device events tell the time, elsewhere a clock of the host.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from replay import Replay
from torch import Tensor

MIN_SECONDS = 1e-3
"""Seconds of one replay that is timed."""
MAX_REPEATS = 64
"""Runs that one graph holds. More IF nodes take longer to capture than they tell."""


@dataclass(frozen=True, kw_only=True)
class Time:
    """Seconds over the rounds."""

    median: float
    low: float
    high: float

    def per(self, count: int) -> Time:
        """Return the time of one of `count`."""
        return Time(median=self.median / count, low=self.low / count, high=self.high / count)

    def show(self, name: str) -> dict[str, float]:
        """Return a row's fields: microseconds, the least and the largest, and their distance as a share of the median."""
        spread = (self.high - self.low) / self.median if self.median else 0.0
        return {f"{name} us": 1e6 * self.median, f"{name} min us": 1e6 * self.low, f"{name} max us": 1e6 * self.high, f"{name} spread": spread}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to do the work that is timed."""

    run: Callable[[], Sequence[Tensor]]
    warm_up: Callable[[], object] | None = None
    """Builds what a capture of `run` launches. None: `run` itself does."""
    begin: Callable[[], object] | None = None
    """Called after the capture, before the first replay."""


def get_l2_bytes() -> int:
    """Return the size of the GPU's L2; without a GPU 0."""
    return int(torch.cuda.get_device_properties(0).L2_cache_size) if torch.cuda.is_available() else 0


def time_once(run: Callable[[], object], num_replays: int) -> float:
    """Return seconds per call over `num_replays` in a row."""
    if not torch.cuda.is_available():
        before = time.perf_counter()
        for _ in range(num_replays):
            run()
        return (time.perf_counter() - before) / num_replays
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(num_replays):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / num_replays


def find_repeats(run: Callable[[], object], *, warm_up: int = 3) -> int:
    """Return how often `run` must be repeated inside one replay for it to take `MIN_SECONDS`."""
    for _ in range(warm_up):
        run()
    return max(1, min(MAX_REPEATS, math.ceil(MIN_SECONDS / max(time_once(run, 3), 1e-9))))


def time_in_turns(runs: Mapping[str, Callable[[], object]], *, num_rounds: int, num_replays: int = 5, warm_up: int = 3) -> dict[str, Time]:
    """Return seconds per call of each, over rounds in which they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(warm_up):
            run()
    for number in range(num_rounds):
        for name in list(runs) if number % 2 else list(reversed(runs)):
            seconds[name].append(time_once(runs[name], num_replays))
    return {name: Time(median=statistics.median(found), low=min(found), high=max(found)) for name, found in seconds.items()}


def time_variants(variants: Mapping[str, Variant], *, captures: bool, num_rounds: int, is_dry: bool = False) -> dict[str, Time]:
    """Return seconds per run of each variant, repeated inside its graph until a replay takes `MIN_SECONDS`.

    `is_dry`: one round of one run each, for the code's sake; the times say nothing.
    """
    replays: dict[str, Replay] = {}
    repeats: dict[str, int] = {}
    for name, variant in variants.items():
        replays[name], repeats[name] = Replay(variant.run, captures=captures, warm_up=variant.warm_up), 1
        if variant.begin is not None:
            variant.begin()
        if not is_dry:
            repeats[name] = find_repeats(replays[name])
        if repeats[name] > 1:

            def run(variant: Variant = variant, count: int = repeats[name]) -> Sequence[Tensor]:
                for _ in range(count):
                    variant.run()
                return ()

            replays[name] = Replay(run, captures=captures, warm_up=variant.warm_up or variant.run)
    for variant in variants.values():
        if variant.begin is not None:
            variant.begin()  # warm-ups compute whatever there is, and count it
    rounds = {"num_rounds": 1, "num_replays": 1, "warm_up": 0} if is_dry else {"num_rounds": num_rounds}
    found = time_in_turns(replays, **rounds)
    return {name: time.per(repeats[name]) for name, time in found.items()}
