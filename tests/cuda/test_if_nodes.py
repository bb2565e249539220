"""IF nodes: the extension that stands in for an older torch is built and loaded where nvcc is, and what can't be had is said on one line."""

from __future__ import annotations

import ctypes
import shutil
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sedac.engine.backends.cuda import extension, if_nodes

needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists(), reason="nvcc is not here, so the extension can't be compiled"
)
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: tests/cuda/test_on_gpu.py asks it")


@pytest.fixture(autouse=True)
def in_a_cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@without_gpu
def test_without_a_gpu_the_reason_is_one_line():
    assert if_nodes.check() == "there is no CUDA device"
    assert if_nodes.get_source() == ""
    with pytest.raises(if_nodes.IfNodesUnavailable, match="no CUDA device"):
        if_nodes.get()


@needs_nvcc
def test_the_extension_is_compiled_once_and_kept():
    library = extension.build((9, 0))
    made = library.stat().st_mtime_ns
    assert extension.build((9, 0)) == library
    assert library.stat().st_mtime_ns == made
    assert [path.name for path in library.parent.iterdir()] == [library.name], "nothing partial is left"


@needs_nvcc
@without_gpu
def test_the_extension_says_what_the_driver_says():
    try:
        library = ctypes.CDLL(str(extension.build((9, 0))))
    except OSError as error:
        pytest.skip(f"the CUDA runtime is not on the loader's path: {error}")
    library.sedac_if_error.restype = ctypes.c_char_p
    library.sedac_if_begin.argtypes, library.sedac_if_end.argtypes = [ctypes.c_void_p] * 3, [ctypes.c_void_p]
    codes = [library.sedac_if_prepare(), library.sedac_if_begin(None, None, None), library.sedac_if_end(None)]
    assert all(codes), "no function hides that there is no GPU"
    assert all(b"CUDA" in library.sedac_if_error(code) or b"driver" in library.sedac_if_error(code) for code in codes)


@needs_nvcc
def test_what_the_compiler_says_is_the_reason(tmp_path, monkeypatch):
    broken = tmp_path / "if_nodes.cu"
    broken.write_text("no such type;")
    monkeypatch.setattr(extension, "SOURCE", broken)
    with pytest.raises(if_nodes.IfNodesUnavailable, match=r"no such type|undefined|identifier"):
        extension.build((9, 0))


def test_without_a_compiler_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(extension.shutil, "which", lambda _: None)
    monkeypatch.setattr(extension.os, "access", lambda *_: False)
    with pytest.raises(if_nodes.IfNodesUnavailable, match=r"install the CUDA toolkit, or a torch that has IF nodes"):
        extension.build((9, 0))


def test_torchs_own_nodes_are_asked_for_by_what_is_there(monkeypatch):
    monkeypatch.delattr(torch.cuda.CUDAGraph, "begin_capture_to_if_node", raising=False)
    with pytest.raises(if_nodes.IfNodesUnavailable, match=r"has no CUDAGraph.begin_capture_to_if_node"):
        if_nodes.TorchNodes()


class Streams:
    """torch's streams: so many, handed out in turn, some of them being captured."""

    def __init__(self, count: int) -> None:
        self.count, self.taken, self.captured, self.current = count, 0, set(), None

    def __call__(self) -> SimpleNamespace:
        self.taken += 1
        return SimpleNamespace(cuda_stream=(self.taken - 1) % self.count)

    @contextmanager
    def use(self, stream):
        before, self.current = self.current, stream.cuda_stream
        yield
        self.current = before


@pytest.fixture
def streams(monkeypatch):
    made = Streams(4)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "begin_capture_to_if_node", lambda *_: None, raising=False)
    monkeypatch.setattr(torch.cuda, "Stream", made)
    monkeypatch.setattr(torch.cuda, "stream", made.use)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.current in made.captured)
    return made


@pytest.mark.parametrize("captured", [{0}, {2}, {1, 2}, {0, 1, 3}])
def test_torch_never_takes_a_stream_for_a_body_that_is_being_captured(streams, captured):
    nodes = if_nodes.TorchNodes()
    streams.captured = captured
    for _ in range(9):
        nodes._pass_captured()
        assert streams().cuda_stream not in captured, "what torch takes next"
    assert streams.current is None


def test_without_a_stream_that_is_free_the_capture_ends(streams):
    nodes = if_nodes.TorchNodes()
    streams.captured = {0, 1, 2, 3}
    with pytest.raises(RuntimeError, match="all 4 streams"):
        nodes._pass_captured()
