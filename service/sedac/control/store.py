"""The store: every revision of the policy, durable before a call returns.

Writes are serial (see database.py), so two writers with one etag cannot both win. Never talks to engines.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

from sedac import wire
from sedac.control.database import Database
from sedac.control.v1 import control_pb2
from sedac.errors import RequestIdReused, RevisionNotFound, StaleEtag
from sedac.policy import Policy

POLICY_NAME = "policies/default"
"""the one policy there is"""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS revisions (
    revision INTEGER PRIMARY KEY, etag TEXT NOT NULL, policy TEXT NOT NULL,
    author TEXT NOT NULL, comment TEXT NOT NULL, created REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS request_ids (
    request_id TEXT PRIMARY KEY, fingerprint TEXT NOT NULL, revision INTEGER NOT NULL, created REAL NOT NULL
) STRICT;
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

    def to_proto(self) -> control_pb2.Policy:
        """Write the revision as the contract shows it."""
        return wire.policy_to_proto(
            self.policy,
            name=POLICY_NAME,
            etag=self.etag,
            revision=self.revision,
            create_time=self.created,
            author=self.author,
            comment=self.comment,
        )


class Store:
    """The revisions of one policy; see the module's docstring."""

    def __init__(self, database: Database, *, now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC)) -> None:
        """Use an open database.

        Raises:
            ConfigError: it is damaged or not writable.
        """
        self._db, self._now = database, now
        database.create(_SCHEMA)

    def find_newest(self) -> Revision | None:
        """Return the revision in force; None before the first."""
        with self._db.reading():
            return self._find_newest()

    def get(self, revision: int) -> Revision:
        """Return one revision.

        Raises:
            RevisionNotFound: there is no such revision.
        """
        with self._db.reading():
            return self._get(revision)

    def list(self, *, before: int | None, limit: int) -> list[Revision]:
        """Return at most `limit` revisions older than `before` (None: from the newest), newest first."""
        with self._db.reading():
            newer = 1 << 62 if before is None else before
            rows = self._db.execute("SELECT * FROM revisions WHERE revision < ? ORDER BY revision DESC LIMIT ?", (newer, limit))
            return [_to_revision(row) for row in rows]

    def find_request(self, request_id: str, fingerprint: str) -> Revision | None:
        """Return the revision that a request made within a day; None where there was no such request.

        Raises:
            RequestIdReused: the request of that id was another one.
        """
        with self._db.reading():
            return self._find_request(request_id, fingerprint)

    def append(
        self,
        policy: Policy,
        *,
        author: str,
        comment: str = "",
        expected_etag: str = "",
        first: bool = False,
        request_id: str = "",
        fingerprint: str = "",
    ) -> Revision:
        """Store a new revision and return it; on disk when this returns.

        A `request_id` seen within a day returns the revision that it made the first time; `fingerprint` tells its request
        from others. `first` asks that there be no policy yet. Equal content still makes a revision: a change is an act with
        an author and a comment.

        Raises:
            StaleEtag: `expected_etag` is given and not the one in force, or this is not the first revision.
            RequestIdReused: the request of that id was another one.
            StoreFailed: nothing was stored, for want of space or a working disk.
        """
        with self._db.transaction():
            seen = self._find_request(request_id, fingerprint) if request_id else None
            made = seen or self._append(policy, author, comment, expected_etag, first)
            if request_id and not seen:
                self._remember(request_id, fingerprint, made)
            return made

    def _append(self, policy: Policy, author: str, comment: str, expected_etag: str, first: bool) -> Revision:
        newest = self._find_newest()
        if newest and first:
            raise StaleEtag(f"there is a policy already (revision {newest.revision}); read it, then retry")
        current_etag = newest.etag if newest else ""
        if expected_etag and expected_etag != current_etag:
            number = newest.revision if newest else 0
            raise StaleEtag(f"etag {expected_etag!r} is not the one in force ({current_etag!r}, revision {number}); read the policy again and retry")
        number = newest.revision + 1 if newest else 1
        body = json.dumps(policy.to_dict(), sort_keys=True)
        etag = hashlib.sha256(f"{number}:{body}".encode()).hexdigest()[:16]
        self._db.execute("INSERT INTO revisions VALUES (?, ?, ?, ?, ?, ?)", (number, etag, body, author, comment, self._now().timestamp()))
        return self._get(number)

    def _remember(self, request_id: str, fingerprint: str, made: Revision) -> None:
        now = self._now().timestamp()
        self._db.execute("DELETE FROM request_ids WHERE created <= ?", (now - _REQUEST_LIFE_SECONDS,))
        self._db.execute("INSERT INTO request_ids VALUES (?, ?, ?, ?)", (request_id, fingerprint, made.revision, now))

    def _find_request(self, request_id: str, fingerprint: str) -> Revision | None:
        oldest = self._now().timestamp() - _REQUEST_LIFE_SECONDS
        seen = self._db.execute("SELECT fingerprint, revision FROM request_ids WHERE request_id = ? AND created > ?", (request_id, oldest)).fetchone()
        if seen is None:
            return None
        if seen[0] != fingerprint:
            raise RequestIdReused(f"request_id {request_id!r} made revision {seen[1]} from another request; send a new one, or none")
        return self._get(seen[1])

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
