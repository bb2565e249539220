"""What passes leave behind, read by the host a step later, so that it never waits for the pass that runs.

The lag is a fixed number of steps, not a matter of what happens to be ready: ranks learn from the same risks before the same step.
T tokens of the step, C checkpoints.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sedac.engine.backends.tokens import Tokens

Array = np.ndarray[Any, Any]
Action = Callable[[Array | None], None]


@dataclass(kw_only=True)
class StepResults:
    """One pass's results on their way to the host."""

    tokens: Tokens | None
    event: torch.cuda.Event | None = None
    then: list[Action] = field(default_factory=list)
    """Called with the MLPs saved per token (T,), or with None where none were saved."""
    unpack: Callable[[], tuple[Array, ...]] | None = None
    """Makes arrays of what has arrived. None where nothing was reduced or decided."""

    def read(self) -> tuple[Array, ...]:
        """Return the arrays, complete; waits where the device has not got so far."""
        if self.event is not None:
            self.event.synchronize()
        return self.unpack() if self.unpack else ()


class Waiting:
    """Passes whose results the host has not read, the oldest first."""

    def __init__(self) -> None:
        self._steps: deque[StepResults] = deque()

    def add(self, tokens: Tokens | None, unpack: Callable[[], tuple[Array, ...]] | None = None, *, is_copying: bool = False) -> None:
        """Remember a pass; `unpack` makes arrays of its results, None: it left none; `is_copying`: the current stream brings them to the host."""
        event = None
        if is_copying:
            event = torch.cuda.Event()
            event.record()
        self._steps.append(StepResults(tokens=tokens, event=event, unpack=unpack))

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
