"""Adaptation: thresholds that follow target exit rates, and the difficulty of a request's prompt.

Plain arithmetic on the host, between steps, over the risks that the step's checkpoints have written; the same risks give the
same thresholds on every rank. Thresholds move as an exponential moving average of rolling quantiles; the quantile asked for is
itself corrected by the rates that came out, so that the rates' long-run mean is the target even while traffic drifts.
Source of the correction: Gibbs and Candes, Adaptive Conformal Inference Under Distribution Shift, 2021, equation 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from sedac.policy.model import Policy

_MEAN_ALPHA = 0.05
_FULL_GAIN_TOKENS = 32  # a step of fewer tokens says less about the rate
_SCALE_BOUNDS = (0.25, 4.0)


class Adapter:
    """Rolling risks per checkpoint and the thresholds that follow from them."""

    def __init__(self, num_checkpoints: int) -> None:
        self.thresholds: list[float] = [0.0] * num_checkpoints
        self.num_updates = 0
        self.is_on = False
        self._policy = Policy()
        self._rates: dict[int, float] = {}
        self._recent: list[np.ndarray[Any, Any]] = [np.zeros(0, dtype=np.float32) for _ in range(num_checkpoints)]
        self._asked: list[float] = [0.0] * num_checkpoints
        """Quantile that each threshold follows: its rate, corrected."""
        self._num_steps = 0
        self._fresh = False

    def configure(self, policy: Policy, thresholds: list[float], index_of_layer: dict[int, int], *, is_new: bool = False) -> None:
        """Take a new policy: what was learned stays, unless it `is_new`, or targets, checkpoints or the generation changed."""
        new, old = policy.adaptation, self._policy.adaptation
        restart = (
            is_new
            or not (policy.enabled and self.is_on)
            or new.generation != old.generation
            or new.target_exit_rates != old.target_exit_rates
            or policy.checkpoints != self._policy.checkpoints
        )
        self._policy = policy
        self.is_on = policy.enabled and new.enabled
        self._rates = {index_of_layer[c.layer]: r for c, r in zip(policy.checkpoints, new.target_exit_rates, strict=False)}
        if restart:
            self.thresholds = list(thresholds[: len(self._recent)])
            self._recent = [np.zeros(0, dtype=np.float32) for _ in self._recent]
            self._asked = [self._rates.get(i, 0.0) for i in range(len(self._recent))]
            self._num_steps = self.num_updates = 0

    def add(self, index: int, risk: np.ndarray[Any, Any]) -> None:
        """Remember the risks that checkpoint `index` has just seen."""
        if self.is_on and risk.size and index in self._rates:
            knobs = self._policy.adaptation
            if self.num_updates and not knobs.frozen:
                observed = float((risk < self.thresholds[index]).mean())
                gain = knobs.alpha * min(1.0, risk.size / _FULL_GAIN_TOKENS)
                self._asked[index] = min(max(self._asked[index] + gain * (self._rates[index] - observed), 0.0), 1.0)
            self._recent[index] = np.concatenate([self._recent[index], risk.astype(np.float32)])[-knobs.window_tokens :]
            self._fresh = True

    def update(self) -> bool:
        """Move the thresholds one step towards the rolling quantiles; False where warm-up, a freeze or no risk holds them."""
        knobs = self._policy.adaptation
        if not self._fresh:
            return False
        self._fresh = False
        self._num_steps += 1
        if knobs.frozen or self._num_steps <= knobs.warmup_steps:
            return False
        alpha = 1.0 if self.num_updates == 0 else knobs.alpha  # the first quantile replaces the guess that the policy started with
        for i in self._rates:
            if self.thresholds[i] > 0 and self._recent[i].size:
                goal = float(np.quantile(self._recent[i], self._asked[i]))
                moved = self.thresholds[i] + alpha * (goal - self.thresholds[i])
                self.thresholds[i] = min(max(moved, knobs.min_threshold, 1e-12), knobs.max_threshold)
        self.num_updates += 1
        return True


@dataclass
class Difficulty:
    """The mean prompt risk of the requests so far, against which one request's own is held."""

    mean: float = math.nan

    def add(self, prompt_risk: float) -> None:
        """Take a finished prompt's mean risk into the mean."""
        if not math.isnan(prompt_risk):
            self.mean = prompt_risk if math.isnan(self.mean) else self.mean + _MEAN_ALPHA * (prompt_risk - self.mean)

    def get_scale(self, prompt_risk: float, sensitivity: float) -> float:
        """Return what the request's thresholds are multiplied by: exp(-sensitivity * (risk / mean - 1)), within 1/4 to 4."""
        if sensitivity == 0 or math.isnan(prompt_risk) or math.isnan(self.mean) or self.mean <= 0:
            return 1.0
        low, high = _SCALE_BOUNDS
        return min(max(math.exp(-sensitivity * (prompt_risk / self.mean - 1)), low), high)
