"""CUDA without a GPU, as far as vLLM's configuration and the building of a model ask for it: what a process must find to choose that platform.

vLLM itself chooses (vllm/platforms/__init__.py): there is a driver's library (NVML) that counts one H100, and a distribution `vllm` that is
not built for the CPU. What vLLM's CUDA wheel brings and its CPU wheel lacks stands as empty modules; their operators, which modules and
layers look up, are declared when that happens. Nothing can be computed or captured. `put_stubs` runs at the start of every process of such an
environment, model inspection's too.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
CUDA_VERSION = "13.0"
_STUBS = ("vllm._C_stable_libtorch", "vllm.vllm_flash_attn._vllm_fa3_C")
_NVML = """
#include <string.h>
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = NUM_GPUS; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = (void *)1; return 0; }
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) { *major = 9; *minor = 0; return 0; }
int nvmlDeviceGetName(void *device, char *name, unsigned size) { strncpy(name, "NVIDIA H100 80GB HBM3", size); return 0; }
int nvmlDeviceGetMemoryInfo(void *device, unsigned long long *memory) {
  memory[0] = memory[1] = 80ULL << 30; memory[2] = 0; return 0;
}
"""


def make_environment(folder: Path, *, num_gpus: int = 1, build: str = "vllm") -> dict[str, str]:
    """Put the stand-ins into `folder` and return the environment of a process that shall find them.

    `build`: distribution of vLLM to be found beside the installed one, `vllm` or another name.
    """
    (information := folder / f"{build.replace('-', '_')}-0.32.0.dist-info").mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {build}\nVersion: 0.32.0\n")
    (folder / "sitecustomize.py").write_text("from tests.cuda.forced_platform import put_stubs\n\nput_stubs()\n")
    (folder / "nvml.c").write_text(_NVML)
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "g++", "c++", "clang"))))
    library = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-x", "c", "-shared", "-fPIC", f"-DNUM_GPUS={num_gpus}", "-o", library, folder / "nvml.c"], check=True)
    roots = [folder, REPOSITORY / "service", REPOSITORY / "probes", REPOSITORY]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SEDAC_", "VLLM_", "CUDA_"))}
    return {**environment, "PYTHONPATH": os.pathsep.join(map(str, roots)), "LD_LIBRARY_PATH": str(folder), "OMP_NUM_THREADS": "1"}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name in _STUBS else None

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ != _STUBS[0]:
            return
        import torch

        torch.version.cuda = CUDA_VERSION
        torch.cuda.graph_pool_handle = lambda: (0, 1)  # the name of a pool, which a wrapper asks for before anything is captured
        module.library = library = torch.library.Library("_C", "FRAGMENT")  # type: ignore[attr-defined]
        library.define("cutlass_scaled_mm_supports_block_fp8(int capability) -> bool")  # called while modules are imported
        library.impl("cutlass_scaled_mm_supports_block_fp8", lambda capability: False, "CompositeExplicitAutograd")
        find, declaring = torch._ops._OpNamespace.__getattr__, set()

        def find_or_define(self: Any, name: str) -> Any:
            try:
                return find(self, name)
            except AttributeError:
                if self.name != "_C" or name.startswith("__") or name in declaring:
                    raise
                declaring.add(name)  # declaring looks it up once more
                for overload in ("", ".out"):
                    library.define(f"{name}{overload}(Tensor x) -> ()")
                return find(self, name)

        torch._ops._OpNamespace.__getattr__ = find_or_define  # type: ignore[method-assign]


def put_stubs() -> None:
    """Let this process find the modules of vLLM's CUDA wheel that its CPU wheel lacks."""
    sys.meta_path.insert(0, _Finder())
