"""The native kernels as torch operators `sedac::*`, and their shapes for torch.compile.

Loaded once per worker on the CPU, where `python -m sedac.engine.backends.build` has built them. Everything here has a plain torch form
elsewhere (state.py, mlp.py), which runs on other devices or without the library.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from sedac.engine.backends.build import find_library

_log = logging.getLogger(__name__)


@functools.cache
def load() -> bool:
    """Load the operators; False, with a warning, where they were not built or don't fit this torch."""
    library = find_library()
    if library is None:
        _log.warning("SEDAC's native kernels are not built, slower torch forms run: python -m sedac.engine.backends.build")
        return False
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        _log.warning("SEDAC's native kernels don't load (%s), slower torch forms run: python -m sedac.engine.backends.build --force", error)
        return False
    torch.library.register_fake("sedac::gate_up", _gate_up_fake)
    torch.library.register_fake("sedac::down", _down_fake)
    torch.library.register_fake("sedac::checkpoint", _checkpoint_fake)
    return True


def _gate_up_fake(x: Tensor, level: Tensor, index: int, num_outputs: int, compact: bool) -> Tensor:
    return x.new_empty((x.shape[0], num_outputs))


def _down_fake(h: Tensor, level: Tensor, index: int, hidden: int) -> Tensor:
    return h.new_empty((h.shape[0], hidden))


def _checkpoint_fake(stream: Tensor, level: Tensor, index: int) -> None:
    return None
