"""The database's schema: what SEDAC 0.1.0 wrote is migrated whole, what is newer or another's is refused untouched, a crash leaves old or new."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest
from sedac.client.client import ControlClient
from sedac.contract import wire
from sedac.contract.v1 import (
    audit_log_pb2,
    audit_log_pb2_grpc,
    probe_sets_pb2,
    probe_sets_pb2_grpc,
    rollouts_pb2,
    rollouts_pb2_grpc,
)
from sedac.control.base.database import Database
from sedac.control.base.schema import APPLICATION_ID, STEPS
from sedac.control.revisions.store import Store
from sedac.errors import ConfigError
from sedac.policy.model import Checkpoint, Policy

from testing.control.running import RunningServer
from testing.probe_sets import make_set

STORES = Path(__file__).parent / "stores"
NEXT = (*STEPS, ("ALTER TABLE revisions ADD COLUMN note TEXT NOT NULL DEFAULT ''", "UPDATE revisions SET note = comment"))


@pytest.fixture
def of_before(settings) -> Path:
    """The database of 0.1.0 and its probe sets, where `settings` look for them."""
    with contextlib.closing(sqlite3.connect(settings.database)) as connection:
        connection.executescript((STORES / "0.1.0.sql").read_text(encoding="utf-8"))
    directory = settings.database.parent / "probe-sets"
    directory.mkdir()
    (weights,) = STORES.glob("*.safetensors")
    shutil.copy(weights, directory)
    return settings.database


def _dump(path: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())


def _read_marks(path: Path) -> tuple[int, int]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return tuple(connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))


def _hash(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.iterdir()) if p.is_file() and p.suffix != ".lock"}


def test_a_database_of_0_1_0_is_migrated_bit_for_bit(of_before, caplog):
    before = _dump(of_before)
    assert sum(line.startswith("INSERT") for line in before) > 30
    assert _read_marks(of_before) == (0, 0)
    with caplog.at_level("INFO"):
        Database(of_before).close()
    assert f"database {of_before}: schema version 0 is now 1" in caplog.text
    assert _read_marks(of_before) == (APPLICATION_ID, 1)
    assert _dump(of_before) == before
    caplog.clear()
    Database(of_before).close()
    assert "schema version" not in caplog.text
    assert _dump(of_before) == before


def test_the_service_goes_on_from_a_database_of_0_1_0(of_before, settings, start):
    server = start(settings)
    with ControlClient(server.address, author="tester") as client, grpc.insecure_channel(server.address) as channel:
        revisions = [client.get_policy(number) for number in range(1, 7)]
        assert [r.etag for r in revisions][:2] == ["33162ebb18a20f41", "3b98332412a1abec"]
        assert [r.author for r in revisions] == ["engine e1", "tester", "tester", "guard", "tester", "rollout"]
        certified = wire.policy_from_proto(revisions[4])
        assert revisions[4].comment == "certified, ä 'quoted' comment"
        assert certified.certificate.num_requests == 500
        assert certified.checkpoints[1] == Checkpoint(layer=5, threshold=0.1 + 0.2, target=0.7)
        status = client.get_status()
        assert (status.policy.revision, status.guard.refused_revision, status.guard.revision) == (6, 3, 4)
        rollouts = rollouts_pb2_grpc.RolloutsStub(channel)
        found = rollouts.ListRollouts(rollouts_pb2.ListRolloutsRequest()).rollouts
        assert [r.state for r in found] == [
            rollouts_pb2.ROLLOUT_STATE_PAUSED,
            rollouts_pb2.ROLLOUT_STATE_PROMOTED,
            rollouts_pb2.ROLLOUT_STATE_ABORTED,
        ]
        assert (found[0].reason.endswith("lunch"), found[1].promoted_revision) == (True, 6)
        assert any(e.mismatch.num_requests > 100 for e in found[1].evidence)
        audit_log = audit_log_pb2_grpc.AuditLogStub(channel).ListAuditEntries(audit_log_pb2.ListAuditEntriesRequest())
        assert [e.number for e in audit_log.entries] == list(range(16, 0, -1))
        sets = probe_sets_pb2_grpc.ProbeSetsStub(channel)
        (fresh,) = sets.ListProbeSets(probe_sets_pb2.ListProbeSetsRequest()).probe_sets
        parts = list(sets.DownloadProbeSet(probe_sets_pb2.DownloadProbeSetRequest(name="fresh")))
        weights = b"".join(part.chunk for part in parts)
        assert hashlib.sha256(weights).hexdigest() == fresh.sha256 == parts[0].header.sha256
        with pytest.raises(grpc.RpcError, match="was there with"):
            sets.UploadProbeSet(make_set("gone", levels=False, seed=2).make_parts())
        rollouts.AbortRollout(rollouts_pb2.ChangeRolloutRequest(comment="after the migration"))
        assert client.update_policy(Policy(enabled=True), comment="after the migration").revision == 7


def test_a_new_database_has_the_newest_version(tmp_path, caplog):
    path = tmp_path / "s.sqlite3"
    with caplog.at_level("INFO"):
        Database(path).close()
    assert _read_marks(path) == (APPLICATION_ID, len(STEPS))
    assert "schema version" not in caplog.text


def test_a_half_made_database_of_0_1_0_gets_the_missing_tables(tmp_path):
    path = tmp_path / "s.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE acknowledged (revision INTEGER PRIMARY KEY) STRICT")
        connection.execute("CREATE TABLE _replication_seq (id INTEGER PRIMARY KEY)")
    store = Store(Database(path))
    assert store.append(Policy(), author="x").revision == 1
    store._db.close()
    assert _read_marks(path) == (APPLICATION_ID, 1)


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_newer_database_is_refused_and_left_as_it_is(tmp_path, is_killed):
    path = tmp_path / "s.sqlite3"
    code = f"""
import os, signal, sys
from pathlib import Path
from sedac.control.base.database import Database
from sedac.control.base.schema import STEPS
database = Database(Path(sys.argv[1]), steps=(*STEPS, ("CREATE TABLE newer (x)",)))
{"os.kill(os.getpid(), signal.SIGKILL)" if is_killed else "database.close()"}
"""
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert (tmp_path / "s.sqlite3-wal").exists() == is_killed
    kept = ("s.sqlite3", "s.sqlite3-wal")
    before = {name: digest for name, digest in _hash(tmp_path).items() if name in kept}
    with pytest.raises(ConfigError) as refused:
        Database(path)
    after = {name: digest for name, digest in _hash(tmp_path).items() if name in before}
    assert after == before
    told = str(refused.value)
    assert f"database {path} has schema version 2, SEDAC " in told
    assert "knows versions up to 1" in told
    assert "run the newer SEDAC that wrote it, or name another file in SEDAC_CONTROL_DATABASE" in told
    Database(path, steps=(*STEPS, ("CREATE TABLE newer (x)",))).close()


def test_the_service_refuses_a_newer_database_at_start(settings):
    Database(settings.database, steps=NEXT).close()
    with pytest.raises(ConfigError, match="has schema version 2"):
        RunningServer(settings)


@pytest.mark.parametrize(
    ("statements", "told"),
    [
        (["CREATE TABLE bookmarks (url TEXT)"], "its tables: bookmarks"),
        (["CREATE TABLE revisions (id INTEGER, body TEXT)"], "its tables: revisions"),
        (["PRAGMA user_version = 3"], "application id 0x0, version 3"),
        (["PRAGMA application_id = 252006674", "CREATE TABLE bookmarks (url TEXT)"], "application id 0xf055112, version 0"),
    ],
)
def test_another_applications_database_is_refused_and_left_as_it_is(tmp_path, statements, told):
    path = tmp_path / "theirs.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
    before = _hash(tmp_path)
    with pytest.raises(ConfigError, match="belongs to another application") as refused:
        Database(path)
    assert _hash(tmp_path) == before
    assert f"database {path} " in str(refused.value)
    assert told in str(refused.value)
    assert "name another file in SEDAC_CONTROL_DATABASE" in str(refused.value)
    with pytest.raises(ConfigError, match="belongs to another application"):
        Database(path)  # the lock was given back


def test_a_step_that_fails_leaves_the_version_before_it(of_before):
    Database(of_before, steps=NEXT).close()
    before = _dump(of_before)
    with pytest.raises(ConfigError, match=r"to schema version 3 \(no such column: absent\) and keeps version 2, whole: look at the disk"):
        Database(of_before, steps=(*NEXT, ("DELETE FROM revisions", "SELECT absent FROM revisions")))
    assert _read_marks(of_before) == (APPLICATION_ID, 2)
    assert _dump(of_before) == before
    with contextlib.closing(sqlite3.connect(of_before)) as connection:
        assert connection.execute("SELECT count(*), sum(note = comment) FROM revisions").fetchone() == (6, 6)


_MIGRATION = """
import sys
from pathlib import Path
from sedac.control.base.database import Database
from sedac.control.base.schema import STEPS
grow = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 400000) INSERT INTO acknowledged SELECT i + 1000 FROM n"
Database(Path(sys.argv[1]), steps=(*STEPS, ("DELETE FROM revisions", grow, "ALTER TABLE audit_log ADD COLUMN note TEXT"))).close()
print("done", flush=True)
"""


def test_a_kill_in_the_middle_of_a_migration_leaves_the_old_schema_or_the_new(of_before):
    """Once the write-ahead log has grown past what is flushed at a commit of step 1, step 2 is on its way to the disk and not committed."""
    before, wal = _dump(of_before), Path(f"{of_before}-wal")
    migration = subprocess.Popen([sys.executable, "-c", _MIGRATION, str(of_before)], stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 300  # of a busy machine
    while not (wal.exists() and wal.stat().st_size > 1 << 20):
        assert migration.poll() is None, "the migration ended before it was seen under way"
        assert time.monotonic() < until
    os.kill(migration.pid, signal.SIGKILL)
    assert migration.communicate()[0] == ""
    assert wal.stat().st_size > 1 << 20, "what the step wrote is there, uncommitted"
    assert _read_marks(of_before) == (APPLICATION_ID, 1)
    assert _dump(of_before) == before
    done = subprocess.run([sys.executable, "-c", _MIGRATION, str(of_before)], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr
    assert _read_marks(of_before) == (APPLICATION_ID, 2)
    with contextlib.closing(sqlite3.connect(of_before)) as connection:
        assert connection.execute("SELECT (SELECT count(*) FROM revisions), (SELECT count(*) FROM acknowledged)").fetchone() == (0, 400_006)
