"""Work that the device may leave out: an IF node of the CUDA graph being captured (if_nodes.py), a plain `if` outside of one.

Collectives stay outside: ranks must not depend on each other's flags.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from sedac.engine.backends.cuda import if_nodes

Result = TypeVar("Result")


def is_capturing() -> bool:
    """Return whether this thread's stream is being captured into a CUDA graph; never initialises CUDA."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def run_if(wanted: Tensor, body: Callable[[], Result], *, always: bool = False) -> Result | None:
    """Run `body` where the device says so; `wanted` is a bool of one element with a fixed address.

    While capturing, the body is captured into an IF node and what it returns has its address in the graph, written or not.
    Otherwise the host reads `wanted`, which waits for the device; `always` runs the body without looking.
    """
    if is_capturing():
        with if_nodes.get().when(wanted):
            return body()
    return body() if always or bool(wanted) else None
