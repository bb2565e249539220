"""The one place that decides which backend computes a model."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from sedac.engine.backends.base import Backend
from sedac.engine.backends.cpu import CpuBackend, load
from sedac.engine.backends.torch import TorchBackend


def choose_backend(device: torch.device, dtype: torch.dtype, *, min_weight_bytes: int | None = None) -> Callable[..., Backend]:
    """Return what makes the backend of a model in `dtype` on `device`, with `Backend`'s arguments.

    `min_weight_bytes`: MLPs of fewer bytes on a rank are not reduced at few rows, where the backend asks; None: its own limit.
    """
    if device.type == "cuda":
        from sedac.engine.backends.cuda.backend import CudaBackend  # needs Triton, whose import the CPU is spared

        return functools.partial(CudaBackend, min_weight_bytes=min_weight_bytes)
    if device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and load():
        return CpuBackend
    return TorchBackend
