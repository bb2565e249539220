"""What crosses between host and device in a step: one copy there before the pass, one copy back after it, both from and to pinned memory.

`DeviceBackend` packs and unpacks; the kernels at the two ends of a step (flags.py) scatter and gather. T tokens of the step, C checkpoints.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sedac.engine.backends.tokens import Tokens

Array = np.ndarray[Any, Any]
SENT_BYTES = 7
"""Bytes per token: an fp32 scale, then a byte each of floor, role and goal."""
_NUM_SLOTS = 4


class Outgoing:
    """Sends a step's tokens to the device.

    The host never waits for a copy in flight: it writes into the next of a few pinned slots, and a slot comes round again only when its
    copy has long been made.
    """

    def __init__(self, max_num_tokens: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        size = SENT_BYTES * max_num_tokens
        self.bytes = torch.zeros(-(-size // 4) * 4, dtype=torch.uint8, device=device)
        """Buffer on the device: fp32 scales (T,), then floors, roles and goals (T,) each."""
        self.scales = self.bytes.view(torch.float32)
        self._slots = [torch.zeros(size, dtype=torch.uint8, pin_memory=is_cuda) for _ in range(_NUM_SLOTS)]
        self._copied = [torch.cuda.Event() if is_cuda else None for _ in range(_NUM_SLOTS)]
        self._next = 0

    def send(self, tokens: Tokens, num_tokens: int) -> None:
        """Start the copy of a step's tokens on the current stream."""
        slot, copied = self._slots[self._next], self._copied[self._next]
        self._next = (self._next + 1) % _NUM_SLOTS
        if copied is not None:
            copied.synchronize()
        n, array = num_tokens, slot.numpy()
        array[: 4 * n].view(np.float32)[:] = tokens.scale_T
        for i, part in enumerate((tokens.floor_T, tokens.role_T, tokens.goal_T), start=4):
            array[i * n : (i + 1) * n] = part
        self.bytes[: SENT_BYTES * n].copy_(slot[: SENT_BYTES * n], non_blocking=True)
        if copied is not None:
            copied.record()


class Returned:
    """Takes what a step left to the host: counts of the sides (S, C, 2), MLPs saved (T,), risks (C, T) and whether decided (T,)."""

    def __init__(self, num_sides: int, num_checkpoints: int, max_num_tokens: int, device: torch.device) -> None:
        self._shape = (num_sides, num_checkpoints, 2)
        self.num_counts, self._num_checkpoints = num_sides * num_checkpoints * 2, num_checkpoints
        size = 8 * self.num_counts + (4 * (num_checkpoints + 1) + 1) * max_num_tokens
        self.bytes = torch.zeros(-(-size // 8) * 8, dtype=torch.uint8, device=device)
        """Buffer on the device: counts (int64), saved and risks (fp32), decided (a byte each), without gaps."""
        self.counts = self.bytes.view(torch.int64)
        self.floats = self.bytes.view(torch.float32)[2 * self.num_counts :]

    def fetch(self, num_tokens: int) -> Tensor:
        """Start the copy to the host behind the current stream's work; its result is whole when that work is done."""
        size = 8 * self.num_counts + (4 * (self._num_checkpoints + 1) + 1) * num_tokens
        return self.bytes[:size].to("cpu", non_blocking=True, copy=True)

    def read(self, fetched: Tensor, num_tokens: int) -> tuple[Array, Array, Array, Array]:
        """Return saved (T,) and decided (T,), risks (C, T), and counts (S, C, 2), of bytes that have arrived."""
        array, floats = fetched.numpy(), 8 * self.num_counts
        counts = array[:floats].view(np.int64).reshape(self._shape)
        values = array[floats : floats + 4 * (self._num_checkpoints + 1) * num_tokens].view(np.float32).reshape(-1, num_tokens)
        return values[0], array[len(array) - num_tokens :], values[1:], counts
