"""IF nodes of CUDA graphs: a part of a captured pass that a replay leaves out when a flag on the device says so.

`guard.run_if` is the one caller. Two sources, chosen by what is there: torch's own (CUDAGraph.begin_capture_to_if_node), or the extension
if_nodes.cu, built by nvcc for a torch without it (extension.py). Bodies of one nesting depth run on one stream, always the same, whichever source
serves: so they share cuBLAS's workspace, and what one body frees the next one takes.
`check` captures and replays small graphs, and its answer decides whether an engine uses CUDA graphs at all (engine/vllm/refusals.py).
Needs CUDA 12.4 or newer. Source: "Conditional Graph Nodes", CUDA programming guide; torch/cuda/graphs.py (torch 2.13).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from sedac.engine.backends.cuda.extension import IfNodesUnavailable, build

_MAX_STREAMS = 4096
_NUM_TRIED = 40
"""Number of bodies of the smoke test's graph, each with another in it. It is more than torch has streams (32)."""


class Nodes(Protocol):
    """One source of IF nodes."""

    name: str

    def open(self, wanted: Tensor, body: torch.cuda.Stream) -> contextlib.AbstractContextManager[None]:
        """While open, what the stream `body` gets is captured into an IF node behind the current stream's work, under the flag `wanted`."""
        ...


class TorchNodes:
    """IF nodes by torch, which takes a stream of its own for each body; `body` joins it, so that the body's work is on the same one every time.

    torch hands its streams out in turn, also to what is being captured, and does not look whether it takes one of those for a body: with so
    many bodies as a model has layers it would, and the capture would fail. So it is led past them (c10/cuda/CUDAStream.cpp, torch 2.13).
    """

    name = "torch"

    def __init__(self) -> None:
        if not hasattr(torch.cuda.CUDAGraph, "begin_capture_to_if_node"):
            raise IfNodesUnavailable(f"torch {torch.__version__} has no CUDAGraph.begin_capture_to_if_node")
        self._turn = [torch.cuda.Stream()]
        """Streams of torch, in the order in which it hands them out."""
        while (stream := torch.cuda.Stream()).cuda_stream != self._turn[0].cuda_stream:
            self._turn.append(stream)
            if len(self._turn) > _MAX_STREAMS:
                raise IfNodesUnavailable(f"torch {torch.__version__} does not hand out its streams in turn, so none can be kept from its bodies")
        self._place = {stream.cuda_stream: i for i, stream in enumerate(self._turn)}

    @contextlib.contextmanager
    def open(self, wanted: Tensor, body: torch.cuda.Stream) -> Iterator[None]:
        """See `Nodes.open`."""
        self._pass_captured()
        graph: Any = torch.cuda.CUDAGraph.get_currently_capturing_graph()
        graph.begin_capture_to_if_node(wanted)
        try:
            own = torch.cuda.current_stream()
            body.wait_stream(own)
            try:
                with torch.cuda.stream(body):
                    yield
            finally:
                own.wait_stream(body)
        finally:
            graph.end_capture_to_conditional_node()

    def _pass_captured(self) -> None:
        """Take streams from torch until the next is one that nothing is captured from.

        Raises:
            RuntimeError: there is none.
        """
        for _ in self._turn:
            following = self._turn[(self._place[torch.cuda.Stream().cuda_stream] + 1) % len(self._turn)]
            with torch.cuda.stream(following):
                if not torch.cuda.is_current_stream_capturing():
                    return
        raise RuntimeError(f"all {len(self._turn)} streams of torch are being captured")


class OwnNodes:
    """IF nodes by if_nodes.cu.

    torch takes a body's allocations for ordinary ones, since the body is a capture of its own; they go to a pool that lives as long as
    this object. One pool serves all graphs: two of them never run at once, and nothing in it is read before it is written.
    """

    name = "sedac's extension"

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(build()))
        self._library.sedac_if_begin.argtypes = [ctypes.c_void_p] * 3
        self._library.sedac_if_end.argtypes = [ctypes.c_void_p]
        self._library.sedac_if_error.restype = ctypes.c_char_p
        self._try(self._library.sedac_if_prepare())
        self._pool = torch.cuda.MemPool()
        self._depth = 0

    def _try(self, error: int) -> None:
        if error:
            raise RuntimeError(f"IF node: {self._library.sedac_if_error(error).decode()} (CUDA error {error})")

    @contextlib.contextmanager
    def open(self, wanted: Tensor, body: torch.cuda.Stream) -> Iterator[None]:
        """See `Nodes.open`."""
        self._try(self._library.sedac_if_begin(torch.cuda.current_stream().cuda_stream, body.cuda_stream, wanted.data_ptr()))
        self._depth += 1
        try:
            # Allocations of this thread: a nested body's are among them.
            with torch.cuda.use_mem_pool(self._pool) if self._depth == 1 else contextlib.nullcontext(), torch.cuda.stream(body):
                yield
        finally:
            self._depth -= 1
            self._try(self._library.sedac_if_end(body.cuda_stream))


class Capture:
    """A source of IF nodes, and the streams that bodies run on, one for each depth."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self._streams: list[torch.cuda.Stream] = []
        self._depth = 0

    def get_stream(self, depth: int) -> torch.cuda.Stream:
        """Return the stream of bodies that lie in so many others."""
        while len(self._streams) <= depth:
            self._streams.append(torch.cuda.Stream(priority=-1))  # of another set than those that graphs are captured from, so never one of them
        return self._streams[depth]

    @contextlib.contextmanager
    def when(self, wanted: Tensor) -> Iterator[None]:
        """Capture what is done meanwhile into an IF node; `wanted` is bool, of one element, with a fixed address on the device."""
        stream = self.get_stream(self._depth)
        self._depth += 1
        try:
            with self.nodes.open(wanted, stream):
                yield
        finally:
            self._depth -= 1


@functools.cache
def _find() -> tuple[Capture | None, str]:
    """Return the first source that passes the smoke test, or None and each one's reason."""
    if not torch.cuda.is_available():
        return None, "there is no CUDA device"
    if torch.cuda.is_current_stream_capturing():
        raise IfNodesUnavailable("nobody has called check() before this capture, and within one it can't look")
    reasons = []
    for make in (TorchNodes, OwnNodes):
        try:
            capture = Capture(make())
            _try_out(capture)
        except Exception as error:  # noqa: BLE001  whatever a driver or compiler says is a reason to do without
            reasons.append(f"{make.name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        else:
            return capture, ""
    return None, "; ".join(reasons)


def check() -> str:
    """Return why IF nodes don't work here, on one line; empty where they do. Looks once per process, a second or a few where nvcc must run."""
    return _find()[1]


def get() -> Capture:
    """Return the source to capture with.

    Raises:
        IfNodesUnavailable: `check` has a reason.
    """
    capture, reason = _find()
    if capture is None:
        raise IfNodesUnavailable(reason)
    return capture


def get_source() -> str:
    """Return the name of the source in use; empty: none."""
    capture, _ = _find()
    return capture.nodes.name if capture else ""


def _try_out(capture: Capture) -> None:
    """Capture bodies with allocations and matrix products, others in them, more of them than torch has streams, and replay under all flags.

    Outputs are poisoned before each replay.

    Raises:
        RuntimeError: a replay left what it should not.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    flags_2 = torch.zeros(2, dtype=torch.bool, device=device)
    x, w = (torch.randn(64, 64, device=device, dtype=torch.bfloat16) for _ in range(2))
    outer, inner, behind = (torch.empty(64, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    counts_2 = torch.empty(2, device=device)

    def write(out: Tensor, factor: float) -> None:
        """Write the product, times a factor, into `out`."""
        out.copy_((x * factor) @ w)  # allocates twice, and cuBLAS takes its workspace

    def run(when: Callable[[Tensor], contextlib.AbstractContextManager[None]]) -> None:
        """Do the test's work, with its conditional parts under `when`."""
        for _ in range(_NUM_TRIED):
            with when(flags_2[0]):
                write(outer, 1.0)
                counts_2[0].add_(1)
                with when(flags_2[1]):
                    write(inner, 2.0)
                    counts_2[1].add_(1)
        write(behind, 3.0)

    for depth in range(2):  # the kernels, and cuBLAS's workspace of each stream, before anything is captured
        with torch.cuda.stream(capture.get_stream(depth)):
            run(lambda _: contextlib.nullcontext())
    torch.cuda.synchronize()
    expected = [out.float().clone() for out in (outer, inner, behind)]
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool):
            run(capture.when)
    except Exception:
        with contextlib.suppress(RuntimeError):  # a capture that failed would keep the allocator waiting for its end
            torch._C._cuda_endAllocateToPool(device.index, pool)
        raise
    for first, second in [*itertools.product((True, False), repeat=2)] * 2:
        flags_2.copy_(torch.tensor([first, second]))
        counts_2.zero_()
        for out in (outer, inner, behind):
            out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        wanted = [first, first and second, True]
        for name, out, right, is_written in zip(("outer", "inner", "following"), (outer, inner, behind), expected, wanted, strict=True):
            if not (torch.allclose(out.float(), right, rtol=0.05, atol=0.1) if is_written else bool(out.isnan().all())):
                fault = "is wrong or missing" if is_written else "is there all the same"
                raise RuntimeError(f"under the flags {first}, {second} the {name} product {fault}")
        if counts_2.tolist() != [_NUM_TRIED * is_written for is_written in wanted[:2]]:
            raise RuntimeError(f"under the flags {first}, {second} bodies ran {counts_2.tolist()} times, of {_NUM_TRIED} each")
