"""The schema of the control service's database: the steps that lead from one version to the next, and how a database is brought up.

A step is a tuple of SQL statements; step N makes version N of version N - 1, in one transaction with the version's own change, so that a
crash leaves the one or the other. A step that was released is never edited, because databases carry what it made: a change of the tables
is a new step at the end. Called by database.py alone.

    0  the databases of SEDAC 0.1.0, which carry no version, with the tables of version 1 or some of them; and a new, empty file
    1  the same tables, all of them, marked with the application id
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from sedac import __version__
from sedac.errors import ConfigError

_log = logging.getLogger(__name__)
_OTHER_PATH = "name another file in SEDAC_CONTROL_DATABASE"

Step = tuple[str, ...]

APPLICATION_ID = 0x53444143
"""Value of `PRAGMA application_id` in the databases that are ours: "SDAC" in ASCII."""

_VERSION_1: Step = (
    """CREATE TABLE IF NOT EXISTS revisions (
    revision INTEGER PRIMARY KEY, etag TEXT NOT NULL, policy TEXT NOT NULL,
    author TEXT NOT NULL, comment TEXT NOT NULL, created REAL NOT NULL
) STRICT""",
    """CREATE TABLE IF NOT EXISTS request_ids (
    request_id TEXT PRIMARY KEY, fingerprint TEXT NOT NULL, revision INTEGER NOT NULL, created REAL NOT NULL
) STRICT""",
    """CREATE TABLE IF NOT EXISTS audit_log (
    number INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, principal TEXT NOT NULL, author TEXT NOT NULL, peer TEXT NOT NULL,
    action TEXT NOT NULL, resource TEXT NOT NULL, before_json TEXT NOT NULL, after_json TEXT NOT NULL, comment TEXT NOT NULL
) STRICT""",
    """CREATE TABLE IF NOT EXISTS rollouts (
    number INTEGER PRIMARY KEY, version INTEGER NOT NULL, state TEXT NOT NULL, body TEXT NOT NULL, evidence BLOB NOT NULL
) STRICT""",
    """CREATE TABLE IF NOT EXISTS rollout_requests (
    request_id TEXT PRIMARY KEY, fingerprint TEXT NOT NULL, number INTEGER NOT NULL, created REAL NOT NULL
) STRICT""",
    """CREATE TABLE IF NOT EXISTS guard_verdicts (
    revision INTEGER PRIMARY KEY, knobs TEXT NOT NULL, made INTEGER NOT NULL, reason TEXT NOT NULL, time REAL NOT NULL
) STRICT""",
    "CREATE TABLE IF NOT EXISTS acknowledged (revision INTEGER PRIMARY KEY) STRICT",
    """CREATE TABLE IF NOT EXISTS probe_sets (
    name TEXT PRIMARY KEY, sha256 TEXT NOT NULL, size_bytes INTEGER NOT NULL, manifest BLOB NOT NULL, manifest_sha256 TEXT NOT NULL,
    levels_sha256 TEXT NOT NULL, author TEXT NOT NULL, created REAL NOT NULL, deleted REAL
) STRICT""",
    f"PRAGMA application_id = {APPLICATION_ID}",
)

STEPS: tuple[Step, ...] = (_VERSION_1,)


def find_version(path: Path, steps: Sequence[Step]) -> int:
    """Return the schema version of a database file, 0 where it is not there yet, without writing to it.

    Raises:
        ConfigError: its version is above `len(steps)`, or it is another application's.
        sqlite3.Error: it can't be read, or is no database.
    """
    if not path.exists():
        return 0
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        application, version = _read_number(connection, "application_id"), _read_number(connection, "user_version")
        if application not in (0, APPLICATION_ID) or (application == 0 and version != 0):
            marks = f"application id {application:#x}, version {version}"
            raise ConfigError(f"database {path} belongs to another application ({marks}); it is left as it is: {_OTHER_PATH}")
        if version > len(steps):
            raise ConfigError(
                f"database {path} has schema version {version}, SEDAC {__version__} knows versions up to {len(steps)}; it is left as it is: "
                f"run the newer SEDAC that wrote it, or {_OTHER_PATH}"
            )
        if application == 0:
            _check_unmarked(path, _list_columns(connection))
    return version


def migrate(connection: sqlite3.Connection, path: Path, version: int, steps: Sequence[Step]) -> None:
    """Bring an open database from `version` to `len(steps)`; logs where it had a version or tables before.

    Raises:
        ConfigError: a step failed; the database has the version before that step, whole.
    """
    had_tables = bool(_list_columns(connection))
    for number, step in enumerate(steps[version:], start=version + 1):
        try:
            connection.execute("BEGIN IMMEDIATE")
            for statement in step:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            if connection.in_transaction:  # SQLite rolls back by itself where the disk is full
                connection.execute("ROLLBACK")
            raise ConfigError(
                f"database {path} can't be brought to schema version {number} ({error}) and keeps version {number - 1}, whole: "
                f"look at the disk, then start again, or {_OTHER_PATH}"
            ) from error
        if had_tables:
            _log.info("database %s: schema version %d is now %d", path, number - 1, number)


def _check_unmarked(path: Path, found: dict[str, set[str]]) -> None:
    """Check that a database without marks is empty or one of SEDAC 0.1.0, whose tables are those of version 1; others may lie beside them.

    Raises:
        ConfigError: it has tables and none is ours, or one has our name and other columns.
    """
    with closing(sqlite3.connect(":memory:")) as memory:
        for statement in _VERSION_1:
            memory.execute(statement)
        ours = _list_columns(memory)
    shared = found.keys() & ours.keys()
    foreign = [name for name in found if found[name] != ours.get(name)]
    if any(name in shared for name in foreign) or (found and not shared):
        names = ", ".join(sorted(foreign)[:5])
        raise ConfigError(f"database {path} belongs to another application (its tables: {names}); it is left as it is: {_OTHER_PATH}")


def _list_columns(connection: sqlite3.Connection) -> dict[str, set[str]]:
    """Return the columns' names by table, SQLite's own tables left out."""
    query = "SELECT t.name, c.name FROM sqlite_master t, pragma_table_info(t.name) c WHERE t.type = 'table' AND t.name NOT GLOB 'sqlite_*'"
    columns: dict[str, set[str]] = {}
    for table, column in connection.execute(query):
        columns.setdefault(table, set()).add(column)
    return columns


def _read_number(connection: sqlite3.Connection, pragma: str) -> int:
    return int(connection.execute(f"PRAGMA {pragma}").fetchone()[0])
