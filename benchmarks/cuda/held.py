"""The one heavy thing that rows of a child process share: weights of a shape, or a decoder; the next one takes its place."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

Held = TypeVar("Held")
_held: dict[Hashable, Any] = {}


def hold(key: Hashable, make: Callable[[], Held]) -> Held:
    """Return what was made under this key; else drop what is held, and make it."""
    if key not in _held:
        _held.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _held[key] = make()
    found: Held = _held[key]
    return found
