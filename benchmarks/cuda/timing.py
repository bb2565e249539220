"""Time what a CUDA graph replays: medians of events, over inputs and weights that do not fit the L2."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

NO_GPU = (
    "no GPU here: timings need an NVIDIA GPU of compute capability 8.0 or newer, a CUDA build of torch 2.13 (CUDA 12.4 or newer) and Triton; "
    "--check runs the correctness part without one"
)


def require_gpu() -> torch.device:
    """Return the GPU.

    Raises:
        SystemExit: there is none; says what is needed.
    """
    if not torch.cuda.is_available():
        raise SystemExit(NO_GPU)
    return torch.device("cuda")


def get_l2_bytes() -> int:
    """Return the size of the GPU's L2."""
    return int(torch.cuda.get_device_properties(0).L2_cache_size)


def capture(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Warm `run` up on a side stream and capture it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def time_graphs(graphs: dict[str, torch.cuda.CUDAGraph], *, num_rounds: int, num_replays: int = 20) -> dict[str, float]:
    """Return seconds per replay, the median over rounds in which the graphs take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    for graph in graphs.values():
        for _ in range(5):
            graph.replay()
    for number in range(num_rounds):
        names = list(graphs) if number % 2 else list(reversed(graphs))
        for name in names:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(num_replays):
                graphs[name].replay()
            end.record()
            end.synchronize()
            seconds[name].append(start.elapsed_time(end) / 1e3 / num_replays)
    return {name: statistics.median(found) for name, found in seconds.items()}
