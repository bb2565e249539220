"""The libraries that vLLM's CPU backend asks to have preloaded, where the environment has them; `sedac serve` gives them to the engine.

Intel's OpenMP comes with vLLM's CPU build (the distribution intel-openmp). vLLM warns where it is missing (v1/worker/cpu_worker.py, 0.32)
and takes torch's libgomp in its place, whose threads wait for each other longer. tcmalloc is the system's, if it has one; a vLLM that brings
its own preloads that by itself (platforms/cpu.py). Neither changes what is computed. Nothing here imports vLLM or torch.
"""

from __future__ import annotations

import ctypes.util
import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from sedac.engine.vllm.graphs import is_cuda

VARIABLE = "LD_PRELOAD"
_OPENMP = ("libiomp", "libomp", "libgomp")
"""Names of OpenMP libraries, by which vLLM too sees that one is preloaded."""
_ALLOCATORS = ("libtcmalloc", "libjemalloc", "libmimalloc")


def find_preloads(environ: Mapping[str, str] = os.environ, prefix: Path = Path(sys.prefix)) -> list[str]:
    """Return what to preload beside what the user preloads: at most one OpenMP, where the user has none, and at most one allocator."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or is_cuda(environ):
        return []
    own, found = environ.get(VARIABLE, ""), []
    openmp = prefix / "lib" / "libiomp5.so"
    if openmp.is_file() and not re.search(r"[\s:]", str(openmp)) and not any(name in own for name in _OPENMP):
        found.append(str(openmp))
    if not any(name in own for name in _ALLOCATORS):
        names = (ctypes.util.find_library(name) for name in ("tcmalloc_minimal", "tcmalloc"))
        found += [name for name in names if name][:1]
    return found


def add_preloads(env: dict[str, str], found: list[str]) -> None:
    """Preload `found` in the processes that get this environment, behind what the user preloads."""
    if found:
        env[VARIABLE] = ":".join([*filter(None, [env.get(VARIABLE, "")]), *found])
