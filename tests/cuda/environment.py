"""Environment of a process that imports SEDAC's packages from this repository."""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def make_environment(**more: str) -> dict[str, str]:
    roots = [str(REPOSITORY / "service"), str(REPOSITORY / "probes"), str(REPOSITORY)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(roots), "OMP_NUM_THREADS": "1", **more}
