"""What is measured and checked again and again: a captured CUDA graph, or the function itself where nothing can be captured.

Between replays whatever the graph writes can be poisoned with NaN, so that what it does not write shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from sedac.engine.backends.cuda import if_nodes
from sedac.engine.step.state import State
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Replay:
    """Runs `run`, which returns tensors, as one graph or, with `captures` false, anew each time."""

    def __init__(
        self, run: Callable[[], Sequence[Tensor]], *, captures: bool, warm_up: Callable[[], object] | None = None, keeps: bool = False
    ) -> None:
        """Capture; `warm_up` (default: `run`) builds before it what the capture launches.

        `keeps`: hold every tensor that the capture made, so that none shares its memory with another and all can be poisoned; else the
        graph reuses memory as an engine's does, and only the outputs can.
        """
        self._run, self._graph = run, None
        self.outputs: list[Tensor] = []
        self._made: list[Tensor] = []
        if not captures:
            return
        problem = if_nodes.check()  # before the capture, in which it could not look
        if problem:
            raise RuntimeError(f"nothing can be captured here: {problem}")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                (warm_up or run)()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        keeper = _Keeper()
        with torch.cuda.graph(self._graph), keeper if keeps else nullcontext():
            self.outputs = list(run())
        self._made = keeper.made

    def __call__(self) -> None:
        """Run once; on a GPU the work may still go on when it returns."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self.outputs = list(self._run())

    def poison(self) -> None:
        """Fill with NaN, or with -1, what the next replay has to write before it reads it."""
        for tensor in (*self.outputs, *self._made) if self._graph is not None else ():
            tensor.fill_(math.nan if tensor.is_floating_point() else -1)

    def run_poisoned(self) -> list[Tensor]:
        """Replay into poisoned memory; return the outputs."""
        if self._graph is None:
            with fill_empty():
                self()
        else:
            self.poison()
            self()
        return self.outputs


class _Keeper(TorchDispatchMode):
    """Holds the tensors that operators make; those that share memory with their arguments are not made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_get_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        self.made += [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.numel() and _get_storage(leaf) not in given]
        return result


def _get_storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def fill_empty() -> Iterator[None]:
    """Let `torch.empty` give NaN, and the largest integer, while this lasts."""
    before, torch.utils.deterministic.fill_uninitialized_memory = torch.utils.deterministic.fill_uninitialized_memory, True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


def poison_scratch(state: State) -> None:
    """Fill with NaN what the state's backend holds between two launches and rewrite in each: their private buffers of floats."""
    for name, value in vars(state.backend).items():
        if name.startswith("_") and isinstance(value, Tensor) and value.is_floating_point():
            value.fill_(math.nan)
