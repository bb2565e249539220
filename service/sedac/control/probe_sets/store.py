"""The store of uploaded probe sets: weights as files named by their digest, everything else in the database.

A set comes in by a file of its own, is verified there, synced, and moved to its place; its row is written last, so that a row means a
whole, verified set. What a crash leaves is removed at the next start. Called from worker threads.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from sedac.control.access.audit_log import AuditLogStore
from sedac.control.access.auth import Caller
from sedac.control.base.database import Database
from sedac.control.probe_sets.record import COLUMNS, StoredProbeSet
from sedac.control.probe_sets.staging import StagedWeights
from sedac.control.probe_sets.weights import WeightsDirectory
from sedac.errors import LimitExceeded, ProbeSetExists, ProbeSetNotFound, StoreFailed
from sedac.probe.verify import Verified, verify

_log = logging.getLogger(__name__)
_MAX_SETS = 1000


class ProbeSetStore:
    """The sets of one service; see the module's docstring."""

    def __init__(
        self,
        database: Database,
        directory: Path,
        audit_log: AuditLogStore,
        *,
        max_bytes: int,
        max_total_bytes: int,
        now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
    ) -> None:
        """Open the directory, or make it, and remove what a crash left there.

        Args:
            max_bytes: of one set's weights.
            max_total_bytes: of all sets' weights.

        Raises:
            ConfigError: the directory can't be used, or another service uses it.
        """
        self._db, self._audit_log, self._now = database, audit_log, now
        self._max_bytes, self._max_total_bytes = max_bytes, max_total_bytes
        self._lock = threading.Lock()
        self._weights = WeightsDirectory(directory)
        rows = database.execute(f"SELECT {COLUMNS} FROM probe_sets").fetchall()
        self._records = {row[0]: StoredProbeSet.from_row(row) for row in rows if row[-1] is None}
        self._deleted = {row[0]: (row[1], row[4]) for row in rows if row[-1] is not None}
        self._clean()

    def close(self) -> None:
        """Let another service use the directory."""
        self._weights.close()

    @property
    def records(self) -> Mapping[str, StoredProbeSet]:
        """The sets by name; never changed, only replaced, so that any thread may look at it."""
        return self._records

    @property
    def deleted(self) -> Mapping[str, str]:
        """The names of sets that are gone, with their digests; such a name still belongs to its content. Replaced like `records`."""
        return {name: sha256 for name, (sha256, _) in self._deleted.items()}

    def find(self, name: str) -> StoredProbeSet:
        """Return one set.

        Raises:
            ProbeSetNotFound: there is none of that name.
        """
        record = self._records.get(name)
        if record is None:
            gone = " any more" if name in self._deleted else ""
            raise ProbeSetNotFound(f"probe set {name[:80]!r} does not exist{gone}; list them, or upload it")
        return record

    def find_same(self, name: str, sha256: str, manifest: bytes) -> StoredProbeSet | None:
        """Return the set that has this very content under this name; None: the name is free for it.

        Raises:
            ProbeSetExists: the name belongs to other content.
        """
        record = self._records.get(name)
        owner = record.content if record else self._deleted.get(name)
        if owner is not None and owner != (sha256, hashlib.sha256(manifest).hexdigest()):
            what = "another manifest" if owner[0] == sha256 else f"sha256 {owner[0][:12]}..., yours has {sha256[:12]}..."
            raise ProbeSetExists(f"probe set {name!r} {'is' if record else 'was'} there with {what}; a name is never given twice, choose another")
        return record

    def check_room(self, size_bytes: int, others_bytes: int = 0) -> None:
        """Check that a set of this size may come in beside what is stored and `others_bytes` that are on their way.

        Raises:
            LimitExceeded: it is too large, or there are too many.
        """
        if size_bytes > self._max_bytes:
            raise LimitExceeded(f"the set has {size_bytes} bytes, at most {self._max_bytes} are taken; raise SEDAC_CONTROL_MAX_PROBE_SET_BYTES")
        if len(self._records) >= _MAX_SETS:
            raise LimitExceeded(f"{_MAX_SETS} probe sets are stored, which is the limit; delete some")
        files = {record.summary.sha256: record.summary.size_bytes for record in self._records.values()}
        used = sum(files.values()) + others_bytes
        if used + size_bytes > self._max_total_bytes:
            raise LimitExceeded(
                f"{used} bytes of probe sets are stored or on their way, {size_bytes} more would be over {self._max_total_bytes}; "
                "delete some, or raise SEDAC_CONTROL_MAX_PROBE_SETS_BYTES"
            )

    def stage(self) -> StagedWeights:
        """Return the place for weights that come in."""
        return self._weights.stage()

    def verify(self, staged: StagedWeights, manifest: bytes) -> Verified:
        """Sync what came in, and look at every byte of it.

        Raises:
            ArtifactError: it is no probe set, or not the one that the manifest tells of.
            StoreFailed: the disk is full or broken.
        """
        staged.sync()
        return verify(manifest, staged.path)

    def add(self, staged: StagedWeights, manifest: bytes, verified: Verified, caller: Caller) -> StoredProbeSet:
        """Store a verified set for good; the same content again returns what is there.

        Raises:
            ProbeSetExists: the name belongs to other content by now.
            LimitExceeded: others took the room meanwhile.
            StoreFailed: nothing was stored, for want of space or a working disk.
        """
        name, sha256 = verified.manifest.name, verified.manifest.sha256
        with self._lock:
            same = self.find_same(name, sha256, manifest)
            if same:
                return same
            self.check_room(verified.size_bytes)
            values = (name, sha256, verified.size_bytes, manifest, hashlib.sha256(manifest).hexdigest(), verified.levels_sha256)
            row = (*values, caller.author, self._now().timestamp(), None)
            record = StoredProbeSet.from_row(row)
            try:
                with self._db.transaction():
                    self._weights.keep(staged, sha256)
                    self._db.execute(f"INSERT OR REPLACE INTO probe_sets ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
                    self._audit_log.append("UploadProbeSet", f"probe-sets/{name}", None, record.to_proto(), caller=caller)
            except BaseException:
                self._remove_file(sha256)
                raise
            self._records = {**self._records, name: record}
            self._deleted = {other: digests for other, digests in self._deleted.items() if other != name}
        return record

    def remove(self, name: str, caller: Caller) -> None:
        """Delete a set; its name stays its content's.

        Raises:
            ProbeSetNotFound: there is none of that name.
            StoreFailed: nothing was changed, for want of space or a working disk.
        """
        with self._lock:
            record = self.find(name)
            with self._db.transaction():
                self._db.execute("UPDATE probe_sets SET deleted = ?, manifest = x'' WHERE name = ?", (self._now().timestamp(), name))
                self._audit_log.append("DeleteProbeSet", f"probe-sets/{name}", record.to_proto(), None, caller=caller)
            self._deleted = {**self._deleted, name: record.content}
            self._records = {other: kept for other, kept in self._records.items() if other != name}
            self._remove_file(record.summary.sha256)

    def open(self, name: str) -> tuple[StoredProbeSet, bytes, BinaryIO]:
        """Return a set, its manifest and its weights, for reading; they stay readable when the set is deleted meanwhile.

        Raises:
            ProbeSetNotFound: there is none of that name.
            StoreFailed: its file is gone or is not what was stored.
        """
        with self._lock:
            record = self.find(name)
            file = self._weights.open(record.summary.sha256, record.summary.size_bytes)
            if file is None:
                path = self._weights.get_path(record.summary.sha256)
                raise StoreFailed(f"{path} is not what was stored; restart the control service, then upload probe set {name!r} again")
            row = self._db.execute("SELECT manifest FROM probe_sets WHERE name = ?", (name,)).fetchone()
        return record, row[0], file

    def _remove_file(self, sha256: str) -> None:
        """Remove weights that no set has any more."""
        if all(record.summary.sha256 != sha256 for record in self._records.values()):
            self._weights.remove(sha256)

    def _clean(self) -> None:
        """Remove what no row tells of; a row without its file is as good as deleted until the file is back."""
        for name, record in list(self._records.items()):
            if not self._weights.has(record.summary.sha256, record.summary.size_bytes):
                path = self._weights.get_path(record.summary.sha256)
                _log.error("probe set %s: %s is missing or broken; upload the set again", name, path)
                self._deleted[name] = record.content
                del self._records[name]
        self._weights.clean({record.summary.sha256 for record in self._records.values()})
