"""The store: the revisions of the policy, durable before a call returns.

Writes are serial (see database.py), so two writers with one etag cannot both win. The newest revisions are kept, and older ones
that something still needs; what was compacted away keeps its number and is told from what never was. Never talks to engines.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from sedac.contract import wire
from sedac.contract.v1 import control_pb2
from sedac.control.access.audit_log import AuditLogStore
from sedac.control.access.auth import Caller
from sedac.control.base.database import Database
from sedac.control.base.settings import KEEP_REVISIONS
from sedac.errors import RequestIdReused, RevisionCompacted, RevisionNotFound, StaleEtag
from sedac.policy.model import Policy

POLICY_NAME = "policies/default"
"""The name of the one policy there is."""
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
    """Time of its creation, in UTC."""

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

    def __init__(
        self,
        database: Database,
        *,
        keep_revisions: int = KEEP_REVISIONS,
        now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
    ) -> None:
        """Use an open database; of its revisions the newest `keep_revisions` are kept, and those that a `keep` asks for."""
        assert keep_revisions >= 1, "the revision in force is always kept"
        self._db, self._now, self._keep_revisions = database, now, keep_revisions
        self._keepers: list[Callable[[], Iterable[int]]] = []

    def keep(self, find_needed: Callable[[], Iterable[int]]) -> None:
        """Ask `find_needed` before revisions are compacted away which of them must stay.

        It is called within the transaction of each append, on the thread that appends, and may read the database.
        """
        self._keepers.append(find_needed)

    def find_newest(self) -> Revision | None:
        """Return the revision in force; None before the first."""
        with self._db.reading():
            return self._find_newest()

    def get(self, revision: int) -> Revision:
        """Return one revision.

        Raises:
            RevisionNotFound: there is no such revision.
            RevisionCompacted: it was compacted away.
        """
        with self._db.reading():
            return self._get(revision)

    def read(self, first: int, *, limit: int) -> list[Revision]:
        """Return at most `limit` revisions from `first` on, oldest first and without a gap; none where `first` is still to come.

        Raises:
            RevisionCompacted: `first` was compacted away.
        """
        with self._db.reading():
            rows = self._db.execute("SELECT * FROM revisions WHERE revision >= ? ORDER BY revision LIMIT ?", (first, limit)).fetchall()
            found = [_to_revision(row) for i, row in enumerate(rows) if row[0] == first + i]
            return found or ([self._get(first)] if rows else [])

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
            RevisionCompacted: the request was carried out, and the revision that it made has been compacted away since.
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
            RevisionCompacted: it was carried out within a day, and the revision that it made has been compacted away since.
            StoreFailed: nothing was stored, for want of space or a working disk.
        """
        with self._db.transaction():
            seen = self._find_request(request_id, fingerprint) if request_id else None
            made = seen or self._append(policy, author, comment, expected_etag, first)
            if request_id and not seen:
                self._remember(request_id, fingerprint, made)
            return made

    def append_audited(self, audit_log: AuditLogStore, policy: Policy, *, action: str, caller: Caller, comment: str = "", **more: Any) -> Revision:
        """Store a new revision and its entry in the audit log as one act; `more` goes to `append`, which says what it raises.

        A repeated request, which makes no revision, leaves no entry.
        """
        with self._db.transaction():
            before = self.find_newest()
            made = self.append(policy, author=caller.author, comment=comment, **more)
            if before is None or made.revision > before.revision:
                audit_log.append(action, POLICY_NAME, before.to_proto() if before else None, made.to_proto(), comment, caller=caller)
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
        self._compact(number)
        return self._get(number)

    def _compact(self, newest: int) -> None:
        horizon = newest - self._keep_revisions
        old = {row[0] for row in self._db.execute("SELECT revision FROM revisions WHERE revision <= ?", (horizon,))}
        if old:
            old.difference_update(*(find_needed() for find_needed in self._keepers))
            for revision in old:
                self._db.execute("DELETE FROM revisions WHERE revision = ?", (revision,))

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
        try:
            return self._get(seen[1])
        except RevisionCompacted as error:
            raise RevisionCompacted(f"request_id {request_id!r} was carried out before and not again; {error}") from None

    def _find_newest(self) -> Revision | None:
        row = self._db.execute("SELECT * FROM revisions ORDER BY revision DESC LIMIT 1").fetchone()
        return _to_revision(row) if row else None

    def _get(self, revision: int) -> Revision:
        row = self._db.execute("SELECT * FROM revisions WHERE revision = ?", (revision,)).fetchone()
        if row:
            return _to_revision(row)
        newest = self._find_newest()
        if newest and 0 < revision < newest.revision:
            limit = f"the newest {self._keep_revisions} are kept (SEDAC_CONTROL_KEEP_REVISIONS)"
            raise RevisionCompacted(
                f"revision {revision} was compacted away: {limit}; the policy in force is revision {newest.revision}: list the revisions, "
                "or read that one and watch from the one after it"
            )
        raise RevisionNotFound(f"revision {revision} does not exist; the newest is {newest.revision if newest else 'none yet'}: list them first")


def check_name(name: str) -> None:
    """Refuse the name of a policy that there isn't.

    Raises:
        RevisionNotFound: there is one policy, and it has another name.
    """
    if name not in ("", POLICY_NAME):
        raise RevisionNotFound(f"policy {name[:40]!r} does not exist; there is {POLICY_NAME!r}")


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
