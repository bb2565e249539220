"""Following revisions and engines: in order, without a gap, resumable; and what compaction leaves."""

from __future__ import annotations

import datetime
import queue
import threading
import time

import grpc
import pytest
from sedac.contract.v1 import control_pb2, control_pb2_grpc
from sedac.control.base.database import Database
from sedac.control.base.metrics import ControlMetrics
from sedac.control.base.settings import ControlSettings
from sedac.control.fleet.engine import Engine
from sedac.control.fleet.fleet import Fleet
from sedac.control.revisions.store import Store
from sedac.errors import ConfigError, RequestIdReused, RevisionCompacted, RevisionNotFound
from sedac.policy.model import Policy

from testing.control.engines import FIRST
from testing.control.running import RunningServer

SYNCED, STALE, NACKED = control_pb2.ENGINE_STATE_SYNCED, control_pb2.ENGINE_STATE_STALE, control_pb2.ENGINE_STATE_NACKED


_SMALL_WINDOW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096)]
"""so that a reader that does not read holds up its stream after a few revisions"""


@pytest.fixture
def stub(server):
    with grpc.insecure_channel(server.address, options=_SMALL_WINDOW) as channel:
        yield control_pb2_grpc.ControlStub(channel)


def _watch(stub, from_revision=0, **request):
    return stub.WatchPolicy(control_pb2.WatchPolicyRequest(from_revision=from_revision, **request), timeout=30)


def _read(stream, count: int) -> list[int]:
    return [next(stream).revision for _ in range(count)]


def _fail(stream) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as failed:
        next(stream)
    return failed.value


def test_a_watch_begins_with_the_policy_in_force_and_goes_on_live(client, stub):
    for _ in range(3):
        client.update_policy(FIRST)
    watch = _watch(stub)
    assert next(watch) == client.get_policy()
    made = [client.update_policy(FIRST, comment=str(i)) for i in range(3)]
    assert [next(watch) for _ in range(3)] == made, "whole revisions, as GetPolicy shows them"
    assert _read(_watch(stub, 1), 6) == [1, 2, 3, 4, 5, 6]
    assert _read(_watch(stub, 5, name="policies/default"), 2) == [5, 6]


@pytest.mark.parametrize("first", [0, 1])
def test_a_watch_waits_for_the_first_policy(client, stub, first):
    watch = _watch(stub, first)
    seen: queue.Queue = queue.Queue()
    threading.Thread(target=lambda: seen.put(next(watch).revision), daemon=True).start()
    with pytest.raises(queue.Empty):
        seen.get(timeout=0.2)
    client.update_policy(FIRST)
    assert seen.get(timeout=5) == 1
    assert _read(_watch(stub, 1), 1) == [1]


def test_watchers_of_many_writers_see_every_revision_once_in_order(client, stub):
    client.update_policy(FIRST)
    watches = [_watch(stub, 1), _watch(stub, 0), _watch(stub, 2)]
    writers = [threading.Thread(target=lambda: [client.update_policy(FIRST) for _ in range(20)]) for _ in range(4)]
    for writer in writers:
        writer.start()
    late = _watch(stub, 1)
    assert [_read(watch, 81 - skipped) for watch, skipped in zip(watches, (0, 0, 1), strict=True)] == [
        list(range(1, 82)),
        list(range(1, 82)),
        list(range(2, 82)),
    ]
    assert _read(late, 81) == list(range(1, 82))
    for writer in writers:
        writer.join()


def test_a_watch_that_broke_off_is_resumed_without_a_gap(client, stub):
    seen: list[int] = []
    for revision in range(1, 21):
        assert client.update_policy(FIRST).revision == revision
        if revision % 3 == 0:
            watch = _watch(stub, (seen or [0])[-1] + 1)
            seen += _read(watch, 2)
            watch.cancel()
    assert seen == list(range(1, 13))
    assert _read(_watch(stub, 13), 8) == list(range(13, 21))


def test_a_slow_watcher_skips_nothing(client, stub):
    client.update_policy(FIRST)
    watch = _watch(stub, 1)
    assert next(watch).revision == 1
    for _ in range(300):
        client.update_policy(FIRST, comment="x" * 1000)
    assert _read(watch, 300) == list(range(2, 302))


@pytest.mark.parametrize(
    ("request_fields", "code", "complaint"),
    [
        ({"from_revision": 5}, "INVALID_ARGUMENT", "from_revision: 5 is outside 0..4, the newest revision is 3: watch from 4 for the next one"),
        ({"from_revision": -1}, "INVALID_ARGUMENT", "from_revision: -1 is outside 0..4"),
        ({"name": "policies/other"}, "NOT_FOUND", "policy 'policies/other' does not exist"),
    ],
)
def test_a_watch_of_what_cannot_come_is_refused_with_the_remedy(client, stub, request_fields, code, complaint):
    for _ in range(3):
        client.update_policy(FIRST)
    refused = _fail(_watch(stub, **request_fields))
    assert refused.code().name == code
    assert complaint in refused.details()


def test_watches_end_with_the_service_and_say_where_to_go_on(settings):
    running = RunningServer(settings)
    with grpc.insecure_channel(running.address) as channel:
        stub = control_pb2_grpc.ControlStub(channel)
        policies, engines = _watch(stub, 1), stub.WatchEngines(control_pb2.WatchEnginesRequest())
        next(engines)
        running.stop()
        for stream, remedy in ((policies, "watch again from revision 1"), (engines, "watch again when it is back")):
            ended = _fail(stream)
            assert ended.code() == grpc.StatusCode.UNAVAILABLE
            assert remedy in ended.details()


class TestCompaction:
    """With the smallest history that the settings allow."""

    @pytest.fixture
    def settings(self, settings):
        return settings.model_copy(update={"keep_revisions": 10})

    def test_what_was_compacted_away_is_out_of_range_for_every_call(self, client, stub):
        for i in range(15):
            client.update_policy(FIRST, request_id=f"r{i}")
        assert [p.revision for p in client.list_revisions()] == list(range(15, 5, -1))
        ended = _fail(_watch(stub, 5))
        assert ended.code() == grpc.StatusCode.OUT_OF_RANGE
        assert "revision 5 was compacted away: the newest 10 are kept (SEDAC_CONTROL_KEEP_REVISIONS)" in ended.details()
        assert "read that one and watch from the one after it" in ended.details()
        assert _read(_watch(stub, 6), 10) == list(range(6, 16))
        for call in (lambda: client.get_policy(5), lambda: client.rollback(5)):
            with pytest.raises(RevisionCompacted, match="revision 5 was compacted away"):
                call()
        with pytest.raises(RevisionNotFound, match="revision 16 does not exist; the newest is 15"):
            client.get_policy(16)
        assert client.rollback(6).revision == 16

    def test_a_request_is_not_carried_out_again_when_its_revision_is_gone(self, client):
        for i in range(15):
            client.update_policy(FIRST, request_id=f"r{i}")
        assert client.update_policy(FIRST, request_id="r5").revision == 6
        with pytest.raises(RevisionCompacted, match="request_id 'r0' was carried out before and not again; revision 1 was compacted away"):
            client.update_policy(FIRST, request_id="r0")
        with pytest.raises(RequestIdReused, match="'r0' made revision 1"):
            client.update_policy(Policy(), request_id="r0")
        assert client.get_policy().revision == 15

    def test_a_repeated_rollback_is_answered_though_its_target_is_gone(self, client):
        for _ in range(10):
            client.update_policy(FIRST)
        made = client.rollback(1, request_id="back")
        client.update_policy(FIRST)
        with pytest.raises(RevisionCompacted):
            client.get_policy(1)
        assert client.rollback(1, request_id="back") == made

    def test_a_watcher_that_compaction_overtakes_is_told_and_not_carried_over_the_gap(self, client, stub):
        client.update_policy(FIRST)
        watch = _watch(stub, 1)
        assert next(watch).revision == 1
        comments = "x" * 1000
        for _ in range(400):
            client.update_policy(FIRST, comment=comments)
        seen = [1]
        with pytest.raises(grpc.RpcError) as ended:
            seen.extend(revision.revision for revision in watch)
        assert ended.value.code() == grpc.StatusCode.OUT_OF_RANGE
        assert seen == list(range(1, len(seen) + 1))
        assert len(seen) < 401


def test_what_is_needed_outlives_compaction_and_is_let_go_of_afterwards(tmp_path):
    database = Database(tmp_path / "s.sqlite3")
    store, needed = Store(database, keep_revisions=10), {3}
    store.keep(lambda: needed)
    store.keep(lambda: [7])
    for _ in range(20):
        store.append(Policy(), author="x")
    assert [r.revision for r in store.list(before=None, limit=100)] == [*range(20, 10, -1), 7, 3]
    assert [r.revision for r in store.read(3, limit=10)] == [3], "what follows a gap is not what follows"
    with pytest.raises(RevisionCompacted):
        store.read(4, limit=10)
    assert store.get(3).revision == 3
    needed.clear()
    store.append(Policy(), author="x")
    with pytest.raises(RevisionCompacted):
        store.get(3)
    database.close()


def test_a_history_cut_shorter_by_a_later_setting_keeps_the_one_in_force(tmp_path):
    database = Database(tmp_path / "s.sqlite3")
    store = Store(database, keep_revisions=100)
    for _ in range(50):
        store.append(Policy(), author="x")
    shorter = Store(database, keep_revisions=10)
    assert shorter.find_newest().revision == 50
    assert shorter.append(Policy(), author="x").revision == 51
    assert [r.revision for r in shorter.list(before=None, limit=100)] == list(range(51, 41, -1))
    database.close()


def test_a_history_shorter_than_ten_is_refused():
    with pytest.raises(ConfigError, match="SEDAC_CONTROL_KEEP_REVISIONS=9"):
        ControlSettings(keep_revisions=9)


def _until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "did not come about"
        time.sleep(0.01)
    return found


def test_engines_are_listed_by_id_in_pages(client, stub, make_engine):
    for number in (3, 1, 2, 5, 4):
        make_engine(f"e{number}")
    _until(lambda: len(client.get_status().engines) == 5)
    client.wait_until_synced(1, 10)
    pages, token = [], ""
    while not pages or token:
        page = stub.ListEngines(control_pb2.ListEnginesRequest(page_size=2, page_token=token))
        pages.append([e.engine.engine_id for e in page.engines])
        token = page.next_page_token
    assert pages == [["e1", "e2"], ["e3", "e4"], ["e5"]]
    (engine, *_) = stub.ListEngines(control_pb2.ListEnginesRequest()).engines
    assert (engine.state, engine.desired_revision, engine.active_revision, engine.engine.model) == (SYNCED, 1, 1, "m")
    with pytest.raises(grpc.RpcError, match=r"page_size: 1001 is outside 0\.\.1000"):
        stub.ListEngines(control_pb2.ListEnginesRequest(page_size=1001))


class _EngineWatch:
    """What a watcher of engines knows: the newest state of each, and how many messages it took."""

    def __init__(self, stub) -> None:
        self.engines: dict[str, control_pb2.EngineStatus] = {}
        self.first: control_pb2.WatchEnginesResponse | None = None
        self.changed: list[set[str]] = []
        self.ended: grpc.StatusCode | None = None
        self._stream = stub.WatchEngines(control_pb2.WatchEnginesRequest(), timeout=60)
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        try:
            for message in self._stream:
                self.first = self.first or message
                self.changed.append({e.engine.engine_id for e in message.engines} | set(message.forgotten_engine_ids))
                for engine in message.engines:
                    self.engines[engine.engine.engine_id] = engine
                for engine_id in message.forgotten_engine_ids:
                    del self.engines[engine_id]
        except grpc.RpcError as error:
            self.ended = error.code()


def test_watchers_of_engines_get_all_now_and_then_what_changes(client, stub, make_engine, server):
    watch = _EngineWatch(stub)
    _until(lambda: watch.first is not None)
    assert not watch.first.engines, "no engine is an answer too"
    quiet, loud = make_engine("quiet"), make_engine("loud")
    _until(lambda: {i: e.state for i, e in watch.engines.items()} == {"quiet": SYNCED, "loud": SYNCED})
    second = _EngineWatch(stub)
    _until(lambda: second.first is not None)
    assert [e.engine.engine_id for e in second.first.engines] == ["loud", "quiet"]

    num_messages = len(watch.changed)
    quiet.send(control_pb2.EngineMessage(report=control_pb2.EngineReport(num_steps=7)))
    _until(lambda: {e.report.num_steps for e in client.get_status().engines} == {0, 7})
    loud.refuse = "tiers[0].level: no"
    client.update_policy(FIRST)
    _until(lambda: watch.engines["loud"].state == NACKED and watch.engines["quiet"].state == SYNCED)
    assert watch.engines["loud"].error.message == "tiers[0].level: no"
    assert (watch.engines["loud"].active_revision, watch.engines["loud"].desired_revision) == (1, 2)
    assert watch.engines["quiet"].active_revision == 2
    num_changed = len(watch.changed) - num_messages
    assert num_changed <= 4, "at most: both pending, one answered, the other answered; the report is no change"

    loud.close()
    _until(lambda: watch.engines["loud"].state == STALE)
    assert watch.changed[-1] == {"loud"}, "whose state did not change is not sent again"
    lost = server.server._fleet.engines["loud"]
    lost.last_seen -= datetime.timedelta(days=2)
    make_engine("late")
    _until(lambda: watch.engines.keys() == {"quiet", "late"} == second.engines.keys())
    assert (watch.ended, second.ended) == (None, None), "nothing has ended a watch"


def test_an_engine_that_joins_late_gets_the_policy_in_force_as_its_first_push(client, make_engine):
    for _ in range(5):
        client.update_policy(FIRST)
    writing = threading.Event()
    writer = threading.Thread(target=lambda: [client.update_policy(FIRST) for _ in iter(writing.is_set, True)])
    writer.start()
    try:
        for number in range(10):
            before = client.get_policy().revision
            assert make_engine(f"e{number}").pushes.get(timeout=10).policy.revision >= before
    finally:
        writing.set()
        writer.join()


def test_what_one_engine_says_costs_no_look_at_the_others(monkeypatch):
    fleet, looked = Fleet(ControlMetrics()), []
    engines = [fleet.join(control_pb2.EngineHello(engine_id=str(i)), "")[0] for i in range(256)]
    find_state = Engine.find_state
    monkeypatch.setattr(Engine, "find_state", lambda self, *desired: looked.append(self) or find_state(self, *desired))
    for engine in engines:
        fleet.notify(engine)
    assert looked == engines
    for engine in engines[:6]:
        fleet.leave(engine)
    again, _ = fleet.join(control_pb2.EngineHello(engine_id="0"), "")
    fleet.leave(engines[0])
    counts = {s.labels["state"]: s.value for m in fleet._metrics.registry.collect() if m.name == "sedac_control_engines" for s in m.samples}
    assert counts == {"pending": 0, "synced": 251, "nacked": 0, "stale": 5}, "answered revision 0 is the desired one: none"
    assert fleet.engines["0"] is again
