"""The directory of weights, of one service alone: files named by their digest, and those that are still coming in, in `staging`.

No path is ever made from what a caller says, and no link is followed. Called from worker threads.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from sedac.control.probe_sets.staging import StagedWeights, remove, storing, sync_directory
from sedac.errors import ConfigError

_log = logging.getLogger(__name__)
_SUFFIX = ".safetensors"
_FILE = re.compile(r"[0-9a-f]{64}\.safetensors")
_REMEDY = "name a directory of this service alone in SEDAC_CONTROL_PROBE_SETS"


class WeightsDirectory:
    """One open directory; see the module's docstring. Digests are 64 hexadecimal digits that were checked."""

    def __init__(self, directory: Path) -> None:
        """Open the directory, or make it, and remove what was still coming in when a service before ended.

        Raises:
            ConfigError: it can't be used, or another service uses it.
        """
        self._directory, self._staging = directory, directory / "staging"
        with _using(directory):
            for path in (directory, self._staging):
                path.mkdir(parents=True, exist_ok=True, mode=0o700)
                if not stat.S_ISDIR(path.lstat().st_mode):
                    raise ConfigError(f"{path} is a link; {_REMEDY}")
            self._lock_file = open(os.open(directory / ".lock", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "wb")  # noqa: SIM115
            try:
                fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self._lock_file.close()
                raise ConfigError(f"{directory} is in use by another control service; {_REMEDY}") from error
            for path in self._staging.iterdir():
                remove(path)

    def close(self) -> None:
        """Let another service use the directory."""
        self._lock_file.close()

    def stage(self) -> StagedWeights:
        """Return the place for weights that come in."""
        return StagedWeights(self._staging)

    def keep(self, staged: StagedWeights, sha256: str) -> None:
        """Give synced weights their place; on disk when this returns.

        Raises:
            StoreFailed: the disk is full or broken.
        """
        path = self.get_path(sha256)
        with storing(path):
            os.rename(staged.path, path)
            sync_directory(self._directory)

    def has(self, sha256: str, size_bytes: int) -> bool:
        """Whether there is a file with these weights, as far as its kind and size tell.

        Raises:
            ConfigError: the directory can't be used.
        """
        with _using(self._directory), contextlib.suppress(FileNotFoundError):
            return _is_whole(self.get_path(sha256).lstat(), size_bytes)
        return False

    def open(self, sha256: str, size_bytes: int) -> BinaryIO | None:
        """Return weights for reading; None: the file is not what was stored. They stay readable when they are removed meanwhile.

        Raises:
            StoreFailed: the file is gone, or the disk is broken.
        """
        path = self.get_path(sha256)
        with storing(path):
            file = open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115
        if _is_whole(os.fstat(file.fileno()), size_bytes):
            return file
        file.close()
        return None

    def remove(self, sha256: str) -> None:
        """Remove weights, where they are there."""
        with contextlib.suppress(OSError):
            self.get_path(sha256).unlink()

    def clean(self, known: Collection[str]) -> None:
        """Remove all weights but those with these digests.

        Raises:
            ConfigError: the directory can't be used.
        """
        with _using(self._directory):
            for path in self._directory.iterdir():
                if _FILE.fullmatch(path.name) and path.name.removesuffix(_SUFFIX) not in known:
                    _log.warning("%s belongs to no probe set and is removed", path)
                    remove(path)

    def get_path(self, sha256: str) -> Path:
        """Return where weights have their place."""
        return self._directory / f"{sha256}{_SUFFIX}"


@contextlib.contextmanager
def _using(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{directory} can't be used ({error}); {_REMEDY}") from error


def _is_whole(found: os.stat_result, size_bytes: int) -> bool:
    return stat.S_ISREG(found.st_mode) and found.st_size == size_bytes
