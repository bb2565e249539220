"""What files say, read again when they change while the service runs: certificates and principals.

A change that can't be used keeps the last good value, and says so in the log and in the metrics, once per change.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from sedac.control.base.metrics import ControlMetrics
from sedac.errors import ConfigError

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_Version = tuple[tuple[int, int, int, int] | None, ...]


class Reloading(Generic[_T]):
    """The newest good value of some files; `refresh` may be called from any thread."""

    def __init__(self, kind: str, paths: Sequence[Path], read: Callable[[], _T], metrics: ControlMetrics) -> None:
        """Read the files for the first time; `kind` is "principals" or "certificate", the metrics' label.

        Raises:
            ConfigError: they can't be used.
        """
        self._kind, self._paths, self._read, self._metrics = kind, tuple(paths), read, metrics
        self._lock = threading.Lock()
        self._seen = self._find_version()
        self.value = read()

    def refresh(self) -> bool:
        """Read the files again where they changed; returns whether there is a new value."""
        with self._lock:
            version = self._find_version()
            if version == self._seen:
                return False
            try:
                value, problem = self._read(), ""
            except ConfigError as error:
                value, problem = self.value, str(error)
            if self._find_version() != version:
                return False  # somebody is writing: look again at the next call
            self._seen, self.value = version, value
        self._metrics.file_refused.labels(self._kind).set(bool(problem))
        names = ", ".join(map(str, self._paths))
        if problem:
            _log.error("%s changed and can't be used, so what was read before stays in force: %s", names, problem)
        else:
            _log.info("%s changed and is in force", names)
        return not problem

    def _find_version(self) -> _Version:
        return tuple(map(_find_version, self._paths))


def _find_version(path: Path) -> tuple[int, int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
