"""What tests of one session make once, whichever process of pytest runs them: files in a folder that all of them share (conftest.py)."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

FOLDER = "PYTEST_SHARED_FOLDER"
"""Names, in the environment of every process of a session, a folder that they share and that is gone in the end."""


def get_folder() -> Path:
    """The session's folder."""
    return Path(os.environ[FOLDER])


def make_once(name: str, make: Callable[[Path], None]) -> Path:
    """Have `make` write the file or folder `name` of the session's folder, unless a test of this session has; return its path.

    `make` gets a path beside it, so that what fails half way is made anew by the next who asks.
    """
    path = get_folder() / name
    with _lock(path.with_name(f"{path.name}.lock")):
        if not path.exists():
            part = path.with_name(f"{path.name}.{os.getpid()}.part")
            make(part)
            part.rename(path)
    return path


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
