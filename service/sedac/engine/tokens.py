"""What a step's tokens may get, and the token buffers as the host reads and writes them.

T tokens of the step, C checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

DECIDES, SOFT, OBSERVED = 1, 2, 4
"""bits of a token's role: checkpoints decide about it; softly; its risk is only looked at"""

Array = np.ndarray[Any, Any]


@dataclass(kw_only=True)
class Tokens:
    """What the step's tokens may get; arrays of length T."""

    role_T: Array
    """uint8, DECIDES | SOFT | OBSERVED"""
    floor_T: Array
    """uint8: level at the first layer"""
    goal_T: Array
    """uint8: level when confident"""
    scale_T: Array
    """float32: multiplies the thresholds"""
    tier_T: Array
    """int: row of the tier counters"""
    decides_T: Array = field(init=False)
    """bool"""
    num_decides: int = field(init=False)
    has_floor: bool = field(init=False)
    tier_counts: Array = field(init=False)

    def __post_init__(self) -> None:
        self.decides_T = (self.role_T & DECIDES) > 0
        self.num_decides = int(np.count_nonzero(self.decides_T))
        self.has_floor = bool(self.floor_T.any())
        self.tier_counts = np.bincount(self.tier_T)


class HostViews:
    """The token buffers as the host sees them: the very memory on the CPU, copies of it on a device."""

    def __init__(self, *, written: Sequence[Tensor], cleared: Sequence[Tensor], read: Sequence[Tensor], active: Tensor) -> None:
        """`written`: level, role, goal, scale (T); `cleared` (T) go to 0 after a step; `read`: saved, done (T), risk (C, T)."""
        self._written, self._cleared, self._read, self._active = written, cleared, read, active
        self._is_cpu = active.device.type == "cpu"
        self._arrays = {id(t): t.numpy() for t in (*written, *cleared, *read, active)} if self._is_cpu else {}
        self._num_rows = 0
        """that the last step wrote"""

    def write(self, tokens: Tokens, num_tokens: int, *, is_new: bool) -> None:
        """Put the step's tokens into the buffers; those that the same tokens left there last time stay."""
        values = (tokens.floor_T, tokens.role_T, tokens.goal_T, tokens.scale_T)
        for buffer, value in list(zip(self._written, values, strict=True))[: None if is_new else 1]:
            if self._is_cpu:
                self._arrays[id(buffer)][:num_tokens] = value
            else:
                buffer[:num_tokens].copy_(torch.from_numpy(value), non_blocking=True)
        if self._num_rows > num_tokens:
            self._written[1][num_tokens : self._num_rows] = 0
        self._num_rows = num_tokens
        self._active.fill_(1)

    def read(self, num_tokens: int) -> tuple[Array, Array, Array]:
        """Return MLPs saved (T,), whether decided (T,) and risks (C, T), and clear what belongs to the step."""
        saved, done, risk = self._read
        if not self._is_cpu:
            values = tuple(t[..., :num_tokens].cpu().numpy() for t in self._read)
            for buffer in self._cleared:
                buffer[:num_tokens].zero_()
            risk[:, :num_tokens] = float("nan")
            self._active.zero_()
            return values[0], values[1], values[2]
        arrays = self._arrays
        saved_T, done_T, risk_CT = (arrays[id(t)][..., :num_tokens].copy() for t in (saved, done, risk))
        for buffer in self._cleared:
            arrays[id(buffer)][:num_tokens] = 0
        arrays[id(risk)][:, :num_tokens] = np.nan
        arrays[id(self._active)][0] = 0
        return saved_T, done_T, risk_CT
