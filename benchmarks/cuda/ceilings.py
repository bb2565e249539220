"""What the card is, and what it reaches at best: bytes copied within its memory and bf16 products per second, on random data."""

from __future__ import annotations

import platform
import shutil
import subprocess
from typing import Any

import numpy
import torch
import triton
from timing import get_l2_bytes, time_once

_COPY_BYTES = 2 << 30
"""The size of each of the two buffers, many times that of an L2 cache."""
_PRODUCT_SIZE = 8192


def run_row(spec: dict[str, Any], context: dict[str, Any]) -> dict[str, Any]:
    """Return the card, its software and its ceilings; `gpu` is empty where there is none."""
    found: dict[str, Any] = {
        "gpu": "", "python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__, "numpy": numpy.__version__,
        "cuda": torch.version.cuda, "driver": _get_driver(),
    }  # fmt: skip
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name, "capability": f"{properties.major}.{properties.minor}", "multiprocessors": properties.multi_processor_count,
            "l2 bytes": get_l2_bytes(), "memory bytes": properties.total_memory,
        }  # fmt: skip
        copied, multiplied = measure(torch.device("cuda"), copy_bytes=_COPY_BYTES, size=_PRODUCT_SIZE)
        found |= {"bytes per second": copied, "flops per second": multiplied}
    elif context["is_check"]:
        measure(torch.device("cpu"), copy_bytes=1 << 20, size=64)  # for the code's sake: a host's ceilings say nothing of a card's
    return found


def measure(device: torch.device, *, copy_bytes: int, size: int) -> tuple[float, float]:
    """Return bytes per second of a copy on the device, read and written, and FLOPs per second of a square bf16 product; the best of six."""
    return 2 * copy_bytes / _time_copy(device, copy_bytes), 2 * size**3 / _time_product(device, size)


def _time_copy(device: torch.device, num_bytes: int) -> float:
    source, target = torch.randn(num_bytes // 4, device=device), torch.empty(num_bytes // 4, device=device)
    return min(time_once(lambda: target.copy_(source), 4) for _ in range(6))


def _time_product(device: torch.device, size: int) -> float:
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    return min(time_once(lambda: a @ b, 5) for _ in range(6))


def _get_driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False).stdout.strip().split("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        return ""
