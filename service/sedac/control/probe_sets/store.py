"""The store of uploaded probe sets: weights as files named by their digest, everything else in the database.

A set comes in by a file of its own in `staging`, is verified there, synced, and renamed to its place; its row is written last, so that a
row means a whole, verified set. What a crash leaves is removed at the next start. No path is ever made from what a caller says, and
no link is followed. Called from worker threads.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import logging
import os
import re
import stat
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sedac.contract.v1 import probe_sets_pb2
from sedac.control.access.audit_log import AuditLogStore
from sedac.control.access.auth import Caller
from sedac.control.base.database import Database
from sedac.control.probe_sets.staging import StagedWeights, remove, storing, sync_directory
from sedac.errors import ConfigError, LimitExceeded, ProbeSetExists, ProbeSetNotFound, StoreFailed
from sedac.policy.layout import ProbeSetSummary
from sedac.probe.manifest import FORMAT, parse_manifest
from sedac.probe.verify import Verified, verify

_log = logging.getLogger(__name__)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS probe_sets (
    name TEXT PRIMARY KEY, sha256 TEXT NOT NULL, size_bytes INTEGER NOT NULL, manifest BLOB NOT NULL, manifest_sha256 TEXT NOT NULL,
    levels_sha256 TEXT NOT NULL, author TEXT NOT NULL, created REAL NOT NULL, deleted REAL
) STRICT;
"""
_COLUMNS = "name, sha256, size_bytes, manifest, manifest_sha256, levels_sha256, author, created, deleted"
_MAX_SETS = 1000
_SUFFIX = ".safetensors"
_FILE = re.compile(r"[0-9a-f]{64}\.safetensors")
_REMEDY = "name a directory of this service alone in SEDAC_CONTROL_PROBE_SETS"


@dataclass(frozen=True, kw_only=True)
class StoredProbeSet:
    """One set that can be named."""

    summary: ProbeSetSummary
    manifest_sha256: str
    model: str
    levels: tuple[str, ...]
    author: str
    created: datetime.datetime
    """UTC"""

    def to_proto(self) -> probe_sets_pb2.ProbeSet:
        """Write what belongs to the set itself; who can load and who names it is the fleet's."""
        summary = self.summary
        message = probe_sets_pb2.ProbeSet(
            name=summary.name,
            sha256=summary.sha256,
            size_bytes=summary.size_bytes,
            format=FORMAT,
            state=probe_sets_pb2.PROBE_SET_STATE_VERIFIED,
            author=self.author,
            model=self.model,
            num_layers=summary.num_layers,
            hidden_size=summary.hidden_size,
            rank=summary.rank,
            checkpoint_layers=summary.checkpoint_layers,
            levels=self.levels,
        )
        message.create_time.FromDatetime(self.created)
        return message


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
        self._db, self._directory, self._audit_log, self._now = database, directory, audit_log, now
        self._max_bytes, self._max_total_bytes = max_bytes, max_total_bytes
        self._staging = directory / "staging"
        self._lock = threading.Lock()
        database.create(_SCHEMA)
        try:
            for path in (directory, self._staging):
                path.mkdir(parents=True, exist_ok=True, mode=0o700)
                if not stat.S_ISDIR(path.lstat().st_mode):
                    raise ConfigError(f"{path} is a link; {_REMEDY}")
            self._lock_file = open(os.open(directory / ".lock", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "wb")  # noqa: SIM115
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            rows = database.execute(f"SELECT {_COLUMNS} FROM probe_sets").fetchall()
            self._records = {row[0]: _to_record(row) for row in rows if row[-1] is None}
            self._deleted = {row[0]: (row[1], row[4]) for row in rows if row[-1] is not None}
            self._clean()
        except BlockingIOError as error:
            self._lock_file.close()
            raise ConfigError(f"{directory} is in use by another control service; {_REMEDY}") from error
        except OSError as error:
            raise ConfigError(f"{directory} can't be used ({error}); {_REMEDY}") from error

    def close(self) -> None:
        """Let another service use the directory."""
        self._lock_file.close()

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
        owner = (record.summary.sha256, record.manifest_sha256) if record else self._deleted.get(name)
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
        return StagedWeights(self._staging)

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
            record = _to_record(row)
            try:
                with self._db.transaction(), storing(self._get_path(sha256)):
                    os.rename(staged.path, self._get_path(sha256))
                    sync_directory(self._directory)
                    self._db.execute(f"INSERT OR REPLACE INTO probe_sets ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
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
            self._deleted = {**self._deleted, name: (record.summary.sha256, record.manifest_sha256)}
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
            path = self._get_path(record.summary.sha256)
            with storing(path):
                file = open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_size != record.summary.size_bytes:
                file.close()
                raise StoreFailed(f"{path} is not what was stored; restart the control service, then upload probe set {name!r} again")
            row = self._db.execute("SELECT manifest FROM probe_sets WHERE name = ?", (name,)).fetchone()
        return record, row[0], file

    def _get_path(self, sha256: str) -> Path:
        return self._directory / f"{sha256}{_SUFFIX}"

    def _remove_file(self, sha256: str) -> None:
        """Remove weights that no set has any more."""
        if all(record.summary.sha256 != sha256 for record in self._records.values()):
            with contextlib.suppress(OSError):
                self._get_path(sha256).unlink()

    def _clean(self) -> None:
        """Remove what no row tells of; a row without its file is as good as deleted until the file is back."""
        for path in self._staging.iterdir():
            remove(path)
        for name, record in list(self._records.items()):
            path = self._get_path(record.summary.sha256)
            with contextlib.suppress(FileNotFoundError):
                found = path.lstat()
                if stat.S_ISREG(found.st_mode) and found.st_size == record.summary.size_bytes:
                    continue
            _log.error("probe set %s: %s is missing or broken; upload the set again", name, path)
            self._deleted[name] = (record.summary.sha256, record.manifest_sha256)
            del self._records[name]
        known = {f"{record.summary.sha256}{_SUFFIX}" for record in self._records.values()}
        for path in self._directory.iterdir():
            if _FILE.fullmatch(path.name) and path.name not in known:
                _log.warning("%s belongs to no probe set and is removed", path)
                remove(path)


def _to_record(row: tuple[str, str, int, bytes, str, str, str, float, float | None]) -> StoredProbeSet:
    name, _, size_bytes, manifest, manifest_sha256, levels_sha256, author, created, _ = row
    made = parse_manifest(manifest, f"manifest of probe set {name}")
    verified = Verified(manifest=made, size_bytes=size_bytes, levels_sha256=levels_sha256)
    return StoredProbeSet(
        summary=verified.summary,
        manifest_sha256=manifest_sha256,
        model=made.model,
        levels=tuple(level.name for level in made.levels),
        author=author,
        created=datetime.datetime.fromtimestamp(created, datetime.UTC),
    )
