"""The extension if_nodes.cu as a library for this GPU: compiled by nvcc where a torch without IF nodes needs it, and kept.

Called by if_nodes.py alone.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("if_nodes.cu")
_NVCC_SECONDS = 120


class IfNodesUnavailable(RuntimeError):
    """No source of IF nodes is to be had here; carries each one's reason."""


def find_compiler() -> str:
    """Return the path of nvcc.

    Raises:
        IfNodesUnavailable: it is not on PATH, nor in CUDA_HOME or /usr/local/cuda.
    """
    places = [shutil.which("nvcc"), *(f"{home}/bin/nvcc" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home)]
    found = next((place for place in places if place and os.access(place, os.X_OK)), None)
    if found is None:
        raise IfNodesUnavailable("no nvcc to build SEDAC's extension with; install the CUDA toolkit, or a torch that has IF nodes (2.12 or newer)")
    return found


def build(capability: tuple[int, int] | None = None) -> Path:
    """Return the library made of if_nodes.cu for this GPU (or a compute capability), compiled the first time: some seconds.

    It is kept in $XDG_CACHE_HOME/sedac by what it was made from, or in a temporary folder where that can't be written.

    Raises:
        IfNodesUnavailable: there is no compiler, or it fails; carries its output.
    """
    compiler = find_compiler()
    major, minor = capability or torch.cuda.get_device_capability()
    target = f"arch=compute_{major}{minor},code=sm_{major}{minor}"
    digest = hashlib.sha256(f"{SOURCE.read_text()}{target}{compiler}{torch.version.cuda}".encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sedac"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(folder)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="sedac-if-nodes-"))
    library = folder / f"if_nodes-{digest}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        made = Path(partial) / library.name
        command = [compiler, "-gencode", target, "-O2", "-shared", "-Xcompiler", "-fPIC", "-cudart", "shared", "-o", str(made), str(SOURCE)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_NVCC_SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise IfNodesUnavailable(f"{compiler} took more than {_NVCC_SECONDS} s") from error
        if done.returncode:
            raise IfNodesUnavailable(f"{compiler} fails on {SOURCE.name}: {(done.stdout + done.stderr).strip()[-1000:]}")
        made.rename(library)
    return library
