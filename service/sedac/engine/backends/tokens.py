"""What a step's tokens may get, and the token buffers as the kernels and, on the CPU, the host read and write them.

On a GPU the host leaves the buffers alone: cuda/transfer.py sends and fetches.

T tokens of the step, C checkpoints.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

DECIDES, SOFT, OBSERVED, OF_CANDIDATE = 1, 2, 4, 8
"""Bits of a token's role: checkpoints decide about it, they do so softly, its risk is only looked at, a roll-out's candidate serves it."""

Array = np.ndarray[Any, Any]


@dataclass(kw_only=True)
class Tokens:
    """What the step's tokens may get; arrays of length T."""

    role_T: Array
    """Role of each token, uint8: DECIDES | SOFT | OBSERVED | OF_CANDIDATE."""
    floor_T: Array
    """Level at the first layer, uint8."""
    goal_T: Array
    """Level when confident, uint8."""
    scale_T: Array
    """Factor on the thresholds, float32."""
    tier_T: Array
    """Row of the tier counters, int."""
    decides_T: Array = field(init=False)
    """Whether checkpoints decide about the token, bool."""
    num_decides: int = field(init=False)
    has_floor: bool = field(init=False)
    tier_counts: Array = field(init=False)

    @functools.cached_property
    def floor_tensor(self) -> Tensor:
        """The same memory as `floor_T`, for operators."""
        return torch.from_numpy(self.floor_T)

    def __post_init__(self) -> None:
        self.decides_T = (self.role_T & DECIDES) > 0
        self.num_decides = int(np.count_nonzero(self.decides_T))
        self.has_floor = bool(self.floor_T.any())
        self.tier_counts = np.bincount(self.tier_T)


class TokenBuffers:
    """What the kernels know of each token, at addresses that stay."""

    def __init__(self, num_checkpoints: int, max_num_tokens: int, device: torch.device) -> None:
        def make(dtype: torch.dtype, *shape: int, fill: float = 0) -> Tensor:
            """Return a tensor on the device, filled with one value."""
            return torch.full(shape, fill, dtype=dtype, device=device)

        self.level_T = make(torch.uint8, max_num_tokens)
        """Level in the layers from here on. Rows past the step's tokens stay 0."""
        self.role_T, self.done_T, self.goal_T = (make(torch.uint8, max_num_tokens) for _ in range(3))
        self.scale_T, self.confidence_T = (make(torch.float32, max_num_tokens) for _ in range(2))
        self.saved_T = make(torch.float32, max_num_tokens)
        """MLPs saved so far in this step, in full MLPs of the token."""
        self.risk_CT = make(torch.float32, num_checkpoints, max_num_tokens, fill=float("nan"))
        """Risks. NaN where not evaluated."""
        self.active = make(torch.uint8, 1)
        self._written = [self.level_T, self.role_T, self.goal_T, self.scale_T]
        self._cleared = [self.level_T, self.done_T, self.confidence_T, self.saved_T]
        self._read = [self.saved_T, self.done_T, self.risk_CT]
        self._arrays = {id(t): t.numpy() for t in self.tensors} if device.type == "cpu" else {}
        """On the CPU, the same memory as the host sees it, by tensor."""
        self._num_rows = 0
        """Number of rows that the last step wrote."""

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in the kernels' order."""
        decided = [self.level_T, self.role_T, self.done_T, self.goal_T, self.scale_T, self.confidence_T]
        return [*decided, self.saved_T, self.risk_CT, self.active]

    def write(self, tokens: Tokens, num_tokens: int, *, is_new: bool) -> None:
        """On the CPU: put the step's tokens into the buffers; those that the same tokens left there last time stay."""
        values = (tokens.floor_T, tokens.role_T, tokens.goal_T, tokens.scale_T)
        for buffer, value in list(zip(self._written, values, strict=True))[: None if is_new else 1]:
            self._arrays[id(buffer)][:num_tokens] = value
        if self._num_rows > num_tokens:
            self._written[1][num_tokens : self._num_rows] = 0
        self._num_rows = num_tokens
        self.active.fill_(1)

    def read(self, num_tokens: int) -> tuple[Array, Array, Array]:
        """On the CPU: return MLPs saved (T,), whether decided (T,) and risks (C, T), and clear what belongs to the step."""
        arrays = self._arrays
        saved_T, done_T, risk_CT = (arrays[id(t)][..., :num_tokens].copy() for t in self._read)
        for buffer in self._cleared:
            arrays[id(buffer)][:num_tokens] = 0
        arrays[id(self.risk_CT)][:, :num_tokens] = np.nan
        arrays[id(self.active)][0] = 0
        return saved_T, done_T, risk_CT
