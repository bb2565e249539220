"""What passes leave behind, read by the host a step later, so that it never waits for the pass that runs.

The lag is a fixed number of steps, not a matter of what happens to be ready: ranks learn from the same risks before the same step.
T tokens of the step, C checkpoints.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sedac.engine.tokens import Tokens

Array = np.ndarray[Any, Any]
Action = Callable[[Array | None], None]


@dataclass(kw_only=True)
class StepResults:
    """One pass's results on their way to the host."""

    tokens: Tokens | None
    tensors: Sequence[Tensor] = ()
    """on the host, complete once `event` is reached; empty: nothing was reduced or decided"""
    event: torch.cuda.Event | None = None
    then: list[Action] = field(default_factory=list)
    """called with the MLPs saved per token (T,), None: none"""

    def read(self) -> list[Array]:
        """Return the tensors, complete; waits where the device has not got so far."""
        if self.event is not None:
            self.event.synchronize()
        return [tensor.numpy() for tensor in self.tensors]


class Waiting:
    """Passes whose results the host has not read, the oldest first."""

    def __init__(self) -> None:
        self._steps: deque[StepResults] = deque()

    def add(self, tokens: Tokens | None, tensors: Sequence[Tensor] = ()) -> None:
        """Start copying a pass's results, tensors on the device, to the host; the buffers may be cleared at once."""
        copies = [tensor.to("cpu", non_blocking=True, copy=True) for tensor in tensors]
        event = None
        if any(tensor.is_cuda for tensor in tensors):
            event = torch.cuda.Event()
            event.record()
        self._steps.append(StepResults(tokens=tokens, tensors=copies, event=event))

    def then(self, action: Action) -> None:
        """Call `action` after the last pass's results are read; at once, with None, where none waits."""
        if self._steps:
            self._steps[-1].then.append(action)
        else:
            action(None)

    def take(self, keep: int) -> Iterator[StepResults]:
        """Yield and forget all passes but the last `keep`."""
        while len(self._steps) > keep:
            yield self._steps.popleft()
