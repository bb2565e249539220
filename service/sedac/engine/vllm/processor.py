"""What tells this machine's processor from another, for whatever is kept on disk and holds on one kind of processor only."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def describe_processor() -> str:
    """Return the architecture, the model, its instructions, and what libraries were told to leave unused."""
    names = [platform.machine(), os.environ.get("ONEDNN_MAX_CPU_ISA", ""), os.environ.get("ATEN_CPU_CAPABILITY", "")]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return "\n".join([*names, *sorted({line for line in lines if line.lower().startswith(("model name", "flags", "features", "cpu part"))})])
