"""Work that the device may leave out: an IF node of the CUDA graph being captured, a plain `if` outside of one.

Source: torch/cuda/graphs.py and torch/_higher_order_ops/cudagraph_conditional_nodes.py (torch 2.13); needs CUDA 12.4 or newer.
Collectives stay outside: ranks must not depend on each other's flags.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

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
        graph: Any = torch.cuda.CUDAGraph.get_currently_capturing_graph()
        graph.begin_capture_to_if_node(wanted)
        try:
            return body()
        finally:
            graph.end_capture_to_conditional_node()
    return body() if always or bool(wanted) else None
