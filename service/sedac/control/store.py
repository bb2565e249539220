"""The store: every revision of the policy, in SQLite, durable before a call returns.

Called by the servicer from worker threads; one connection, one lock, so writes are serial and two writers with one etag
cannot both win. Never talks to engines.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import sqlite3
import threading
from dataclasses import dataclass
from pathlib import Path

from sedac.errors import ConfigError, RevisionNotFound, StaleEtag
from sedac.policy import Policy

_SCHEMA = """
CREATE TABLE IF NOT EXISTS revisions (
    revision INTEGER PRIMARY KEY, etag TEXT NOT NULL, policy TEXT NOT NULL,
    author TEXT NOT NULL, comment TEXT NOT NULL, created REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS requests (request_id TEXT PRIMARY KEY, revision INTEGER NOT NULL, created REAL NOT NULL) STRICT;
"""
_REQUEST_LIFE_SECONDS = 24 * 3600.0


@dataclass(frozen=True, kw_only=True)
class Revision:
    """One accepted change."""

    revision: int
    etag: str
    policy: Policy
    author: str
    comment: str
    created: datetime.datetime
    """UTC"""


class Store:
    """The revisions of one policy; see the module's docstring."""

    def __init__(self, path: Path) -> None:
        """Open or create the database.

        Raises:
            ConfigError: the file can't be opened or is not a database of this kind.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"database {path} can't be used ({error}); name a writable file in SEDAC_CONTROL_DATABASE") from error
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._db.close()

    def find_newest(self) -> Revision | None:
        """Return the revision in force; None before the first."""
        with self._lock:
            return self._find_newest()

    def get(self, revision: int) -> Revision:
        """Return one revision.

        Raises:
            RevisionNotFound: there is no such revision.
        """
        with self._lock:
            return self._get(revision)

    def list(self, *, before: int | None, limit: int) -> list[Revision]:
        """Return at most `limit` revisions older than `before` (None: from the newest), newest first."""
        with self._lock:
            rows = self._db.execute("SELECT * FROM revisions WHERE revision < ? ORDER BY revision DESC LIMIT ?", (before or 1 << 62, limit))
            return [_to_revision(row) for row in rows]

    def append(self, policy: Policy, *, author: str, comment: str = "", expected_etag: str = "", request_id: str = "") -> Revision:
        """Store a new revision and return it; on disk when this returns.

        A `request_id` seen within a day returns the revision that it made the first time. Equal content still makes a
        revision: a change is an act with an author and a comment.

        Raises:
            StaleEtag: `expected_etag` is given and not the one in force.
        """
        now = datetime.datetime.now(datetime.UTC)
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                made = self._append(policy, author, comment, expected_etag, request_id, now)
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
            return made

    def _append(self, policy: Policy, author: str, comment: str, expected_etag: str, request_id: str, now: datetime.datetime) -> Revision:
        if request_id:
            self._db.execute("DELETE FROM requests WHERE created < ?", (now.timestamp() - _REQUEST_LIFE_SECONDS,))
            seen = self._db.execute("SELECT revision FROM requests WHERE request_id = ?", (request_id,)).fetchone()
            if seen:
                return self._get(seen[0])
        newest = self._find_newest()
        current_etag = newest.etag if newest else ""
        if expected_etag and expected_etag != current_etag:
            number = newest.revision if newest else 0
            raise StaleEtag(f"etag {expected_etag!r} is not the one in force ({current_etag!r}, revision {number}); read the policy again and retry")
        number = newest.revision + 1 if newest else 1
        body = json.dumps(policy.to_dict(), sort_keys=True)
        etag = hashlib.sha256(f"{number}:{body}".encode()).hexdigest()[:16]
        self._db.execute("INSERT INTO revisions VALUES (?, ?, ?, ?, ?, ?)", (number, etag, body, author, comment, now.timestamp()))
        if request_id:
            self._db.execute("INSERT INTO requests VALUES (?, ?, ?)", (request_id, number, now.timestamp()))
        return self._get(number)

    def _find_newest(self) -> Revision | None:
        row = self._db.execute("SELECT * FROM revisions ORDER BY revision DESC LIMIT 1").fetchone()
        return _to_revision(row) if row else None

    def _get(self, revision: int) -> Revision:
        row = self._db.execute("SELECT * FROM revisions WHERE revision = ?", (revision,)).fetchone()
        if not row:
            newest = self._find_newest()
            raise RevisionNotFound(f"revision {revision} does not exist; the newest is {newest.revision if newest else 'none yet'}: list them first")
        return _to_revision(row)


def _to_revision(row: tuple[int, str, str, str, str, float]) -> Revision:
    number, etag, body, author, comment, created = row
    return Revision(
        revision=number,
        etag=etag,
        policy=Policy.from_dict(json.loads(body)),
        author=author,
        comment=comment,
        created=datetime.datetime.fromtimestamp(created, datetime.UTC),
    )
