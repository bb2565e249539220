"""Lets every Python process that has this folder in PYTHONPATH take the processor for one without AMX, as torch and vLLM ask for it.

A matrix puts it into the environment of all its servers, plain vLLM's too, beside ONEDNN_MAX_CPU_ISA, which oneDNN reads itself:

    environment: {PYTHONPATH: benchmarks/serving/without_amx, ONEDNN_MAX_CPU_ISA: AVX512_CORE_BF16}

vLLM (0.32) then packs no weights for AMX and takes its attention kernels for AVX-512.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType


class _Loader(importlib.abc.Loader):
    """Loads torch.cpu and takes AMX from it."""

    def __init__(self, inner: importlib.abc.Loader) -> None:
        self._inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Let the usual loader make the module."""
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then answer for it."""
        self._inner.exec_module(module)
        for name in ("_is_amx_tile_supported", "_is_amx_fp16_supported"):
            if hasattr(module, name):
                setattr(module, name, lambda: False)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds torch.cpu where everybody finds it."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        """Return torch.cpu's spec with the loader above, and None for every other module."""
        if fullname != "torch.cpu":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


sys.meta_path.insert(0, _Finder())
