"""The store: durable, whole, in order; compared with a model of it, and killed while it writes."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from sedac.control.base.database import Database
from sedac.control.revisions.store import Store
from sedac.errors import ConfigError, RevisionNotFound, StaleEtag, StoreFailed
from sedac.policy.model import Checkpoint, Policy

from testing.strategies import valid_policies


class StoreAgainstModel(RuleBasedStateMachine):
    """Appends, repeats, stale etags and reopening, against a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "s.sqlite3"
        self.store = Store(Database(self.path))
        self.model: list[Policy] = []
        self.requests: dict[str, int] = {}

    @rule(policy=valid_policies(), request_id=st.sampled_from(["", "a", "b", "c"]), guard=st.sampled_from(["none", "good", "stale"]))
    def append(self, policy, request_id, guard):
        newest = self.store.find_newest()
        etag = {"none": "", "good": newest.etag if newest else "", "stale": "stale"}[guard]
        if request_id in self.requests:
            assert self.store.append(policy, author="x", expected_etag=etag, request_id=request_id).revision == self.requests[request_id]
        elif guard == "stale":
            with pytest.raises(StaleEtag):
                self.store.append(policy, author="x", expected_etag=etag, request_id=request_id)
        else:
            made = self.store.append(policy, author="x", expected_etag=etag, request_id=request_id)
            self.model.append(policy)
            assert made.revision == len(self.model)
            if request_id:
                self.requests[request_id] = made.revision

    @rule()
    def reopen(self):
        self.store._db.close()
        self.store = Store(Database(self.path))

    @invariant()
    def holds_what_the_model_holds(self):
        assert [r.policy for r in self.store.list(before=None, limit=1000)] == self.model[::-1]
        newest = self.store.find_newest()
        assert (newest.revision if newest else 0) == len(self.model)
        with pytest.raises(RevisionNotFound):
            self.store.get(len(self.model) + 1)

    def teardown(self):
        self.store._db.close()
        self.directory.cleanup()


TestStoreAgainstModel = StoreAgainstModel.TestCase
TestStoreAgainstModel.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)

_WRITER = """
import sys
from pathlib import Path
from sedac.control.base.database import Database
from sedac.control.revisions.store import Store
from sedac.policy.model import Checkpoint, Policy
store = Store(Database(Path(sys.argv[1])))
while True:
    number = (store.find_newest().revision if store.find_newest() else 0) + 1
    made = store.append(Policy(checkpoints=(Checkpoint(layer=number, threshold=number),)), author="w", request_id=f"r{number}")
    print(made.revision, flush=True)
"""


def test_acknowledged_writes_survive_kill_9(tmp_path):
    path, acknowledged = tmp_path / "s.sqlite3", 0
    for round_number in range(5):
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        lines = [writer.stdout.readline() for _ in range(5)]
        time.sleep(0.013 * round_number)
        os.kill(writer.pid, signal.SIGKILL)
        lines += writer.communicate()[0].splitlines()
        acknowledged = int(next(line for line in reversed(lines) if line.strip().isdigit()))
        store = Store(Database(path))
        revisions = store.list(before=None, limit=100_000)
        store._db.close()
        assert revisions[0].revision in (acknowledged, acknowledged + 1), "at most the write in flight is beyond the last acknowledgement"
        assert [r.revision for r in revisions] == list(range(revisions[0].revision, 0, -1))
        assert all(r.policy.checkpoints[0].layer == r.revision for r in revisions), "no revision is half written"
    assert acknowledged >= 25


def test_a_request_id_is_forgotten_after_a_day(tmp_path):
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    store = Store(Database(tmp_path / "s.sqlite3"), now=lambda: now)
    assert store.append(Policy(), author="x", request_id="a").revision == 1
    now += datetime.timedelta(hours=23, minutes=59)
    assert store.append(Policy(), author="x", request_id="a").revision == 1
    assert store.find_request("a", "").revision == 1
    now += datetime.timedelta(minutes=1)
    assert store.find_request("a", "") is None
    assert store.append(Policy(), author="x", request_id="a").revision == 2
    assert store.append(Policy(), author="x", request_id="a").revision == 2
    store._db.close()


def test_a_first_revision_is_made_once(tmp_path):
    store = Store(Database(tmp_path / "s.sqlite3"))
    assert store.append(Policy(), author="x", first=True).revision == 1
    with pytest.raises(StaleEtag, match=r"there is a policy already \(revision 1\)"):
        store.append(Policy(), author="x", first=True)
    store._db.close()


def test_a_full_disk_stores_nothing_and_is_survived(tmp_path):
    store = Store(Database(tmp_path / "s.sqlite3"))
    store.append(Policy(), author="x")
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    for _ in range(2):
        with pytest.raises(StoreFailed, match="disk is full; nothing was stored"):
            store.append(Policy(), author="x", comment="x" * 100_000)
    store._db.execute("PRAGMA max_page_count = 1000000")
    assert store.append(Policy(), author="x", comment="x" * 100_000).revision == 2
    store._db.close()


def test_one_database_serves_one_process(tmp_path):
    path = tmp_path / "s.sqlite3"
    store = Store(Database(path))
    with pytest.raises(ConfigError, match="in use by another control service"):
        Store(Database(path))
    store.append(Policy(), author="x")
    store._db.close()
    again = Store(Database(path))
    assert again.find_newest().revision == 1
    again._db.close()


def test_writes_reach_the_disk_before_they_return(tmp_path):
    store = Store(Database(tmp_path / "s.sqlite3"))
    assert store._db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    store._db.close()


def test_a_file_that_is_no_database_is_refused_with_the_remedy(tmp_path):
    path = tmp_path / "s.sqlite3"
    path.write_bytes(b"this is not a database" * 100)
    with pytest.raises(ConfigError, match="name a writable file in SEDAC_CONTROL_DATABASE"):
        Store(Database(path))


def test_revisions_stored_without_the_newer_knobs_get_their_defaults(tmp_path):
    path = tmp_path / "control.sqlite3"
    database = Database(path)
    Store(database)
    database.close()
    body = '{"enabled": true, "probe_set": "", "checkpoints": [{"layer": 2, "threshold": 0.5}], "phase": "decode", "scope": "token"}'
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("INSERT INTO revisions VALUES (1, 'e', ?, 'a', '', 0.0)", (body,))
    store = Store(Database(path))
    assert store.find_newest().policy == Policy(enabled=True, checkpoints=(Checkpoint(layer=2, threshold=0.5),))
    store._db.close()
