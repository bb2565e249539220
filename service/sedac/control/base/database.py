"""The control service's database: one SQLite file, durable before a write returns, for one process alone.

Revisions, roll-outs, probe sets, the guard and the audit log keep their rows in it, each in its own file; its tables are in schema.py.
`transaction` makes what several of them write one act. One connection and one lock: writes are serial. Called from worker threads,
because an fsync must not hold up the event loop.

Opening brings an older schema to the newest, each step in a transaction of its own, so that a crash leaves the version before a step or
the one after it. A newer schema, and what another application wrote, is refused before anything is written.
"""

from __future__ import annotations

import contextlib
import fcntl
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sedac.control.base.schema import STEPS, Step, find_version, migrate
from sedac.errors import ConfigError, StoreFailed


class Database:
    """One open database; see the module's docstring."""

    def __init__(self, path: Path, *, steps: Sequence[Step] = STEPS) -> None:
        """Open or create the file, and bring its schema to version `len(steps)`.

        Raises:
            ConfigError: the file can't be opened, is not a database, or another control service uses it; its schema is newer, or
                another application's.
        """
        self.path, self._lock = path, threading.RLock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock_file = open(f"{path}.lock", "w")  # noqa: SIM115  held until close; the kernel lets go after a kill -9
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock_file.close()
            raise ConfigError(f"database {path} is in use by another control service; stop that one or change SEDAC_CONTROL_DATABASE") from error
        except OSError as error:
            raise ConfigError(f"database {path} can't be used ({error}); name a writable file in SEDAC_CONTROL_DATABASE") from error
        try:
            self._connection = _open(path, steps)
        except sqlite3.Error as error:
            self._lock_file.close()
            raise ConfigError(f"database {path} can't be used ({error}); name a writable file in SEDAC_CONTROL_DATABASE") from error
        except ConfigError:
            self._lock_file.close()
            raise

    def close(self) -> None:
        """Close the file and let another process use it."""
        with self._lock:
            self._connection.close()
            self._lock_file.close()

    def execute(self, statement: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        """Run one statement, inside the running transaction where there is one.

        Raises:
            StoreFailed: nothing was stored, for want of space or a working disk.
        """
        with self._guarded():
            return self._connection.execute(statement, values)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Make the block's writes one act, on disk when it ends; all or none. Blocks may nest: the outermost commits.

        Raises:
            StoreFailed: nothing was stored, for want of space or a working disk.
        """
        with self._guarded():
            if self._connection.in_transaction:
                yield
                return
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # SQLite rolls back by itself where the disk is full
                    self._connection.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Keep other threads' writes out while the block reads.

        Raises:
            StoreFailed: the database can't be read.
        """
        with self._guarded():
            yield

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                raise StoreFailed(f"database {self.path} failed: {error}; nothing was stored: look at the disk, then retry") from error


def _open(path: Path, steps: Sequence[Step]) -> sqlite3.Connection:
    version = find_version(path, steps)
    connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        migrate(connection, path, version, steps)
    except BaseException:
        connection.close()
        raise
    return connection
