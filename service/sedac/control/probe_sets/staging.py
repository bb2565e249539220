"""Files on their way into a store: written under a name that nobody knows, whole before they get their place, gone where they don't.

No link is followed. Called from worker threads.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sedac.errors import StoreFailed


class StagedWeights:
    """A file that fills up in `staging`; nobody else knows its name. Whatever is called after `discard` leaves no file behind."""

    def __init__(self, staging: Path) -> None:
        self.path = staging / secrets.token_hex(16)
        self._file: BinaryIO | None = None
        self._is_discarded = False
        self._lock = threading.Lock()

    def write(self, chunk: bytes) -> None:
        """Add a chunk.

        Raises:
            StoreFailed: the disk is full or broken.
        """
        with self._lock, storing(self.path):
            if self._is_discarded:
                return
            if self._file is None:
                number = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                self._file = open(number, "wb")  # noqa: SIM115  closed by sync or discard
            self._file.write(chunk)

    def sync(self) -> None:
        """Have all of it on disk when this returns.

        Raises:
            StoreFailed: the disk is full or broken.
        """
        with self._lock, storing(self.path):
            if self._file and not self._is_discarded:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()

    def discard(self) -> None:
        """Remove the file, where it has not found its place."""
        with self._lock, contextlib.suppress(OSError):
            self._is_discarded = True
            if self._file:
                self.path.unlink(missing_ok=True)
                self._file.close()


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    """Tell of a disk that fails while the block runs.

    Raises:
        StoreFailed: names the path and the reason.
    """
    try:
        yield
    except OSError as error:
        raise StoreFailed(f"{path} failed: {error.strerror}; nothing was stored: look at the disk, then retry") from error


def remove(path: Path) -> None:
    """Remove a file, a link and never what it leads to, or a directory."""
    if stat.S_ISDIR(path.lstat().st_mode):
        shutil.rmtree(path)
    else:
        path.unlink()


def sync_directory(path: Path) -> None:
    """Have a directory's names on disk when this returns."""
    number = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        os.fsync(number)
    finally:
        os.close(number)
