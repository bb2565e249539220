"""The kinds of levels, registered in `KINDS`: a kind's place there is its number, which the kernels of all backends know it by.

A new kind is a file here, with its plain torch form, and a line in `KINDS`. A backend that shall have it computes it in its own kernels
(kernels/mlp.cpp, cuda/mlp.py) and names it in its `kinds`; one without refuses the level by name when the model is built (base.py). What a
probe set may hold is said in probe/manifest.py and probe/verify.py. Numbers of kinds stay: kernels/state.h repeats them for C++, and tests
hold both against this list.
"""

from __future__ import annotations

from sedac.engine.backends.kinds.base import FULL_KIND, SKIP_KIND, Kind
from sedac.engine.backends.kinds.contextual import CONTEXTUAL
from sedac.engine.backends.kinds.width import WIDTH

KINDS: tuple[Kind, ...] = (
    FULL_KIND,
    SKIP_KIND,
    WIDTH,
    CONTEXTUAL,
)


def find_number(name: str) -> int:
    """Return the number of the kind with this name.

    Raises:
        KeyError: no such kind is registered.
    """
    for number, kind in enumerate(KINDS):
        if kind.name == name:
            return number
    raise KeyError(name)


KIND_FULL, KIND_SKIP, KIND_WIDTH, KIND_CONTEXTUAL = (find_number(kind.name) for kind in (FULL_KIND, SKIP_KIND, WIDTH, CONTEXTUAL))

__all__ = ["KINDS", "KIND_CONTEXTUAL", "KIND_FULL", "KIND_SKIP", "KIND_WIDTH", "Kind", "find_number"]
