"""Probe sets over the wire: what is uploaded is there whole, to be named, fetched and deleted; what is refused leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_status import rpc_status
from sedac.client.client import ControlClient
from sedac.contract import wire
from sedac.contract.v1 import probe_sets_pb2, probe_sets_pb2_grpc
from sedac.control.base.settings import ControlSettings
from sedac.errors import (
    ArtifactError,
    ConfigError,
    LimitExceeded,
    PolicyInvalid,
    ProbeSetExists,
    ProbeSetInUse,
    ProbeSetNotFound,
)
from sedac.policy.model import Checkpoint, Policy
from sedac.probe.verify import verify

from tests.control.conftest import RunningServer
from tests.probe_sets import MadeSet, make_set, pack_raw
from tests.strategies import certify

BARE = make_set(levels=False)
CHECKPOINTS = (Checkpoint(layer=2, threshold=0.5), Checkpoint(layer=5, threshold=0.25))
NAMED = Policy(enabled=True, probe_set="fresh", checkpoints=CHECKPOINTS)


@pytest.fixture
def settings(tmp_path) -> ControlSettings:
    return ControlSettings(
        port=0, metrics_port=0, database=tmp_path / "control.sqlite3", drain_seconds=0.2, max_probe_set_bytes=40_000, max_probe_sets_bytes=20_000,
        max_uploads=2, upload_silence_seconds=20,
    )  # fmt: skip


@pytest.fixture
def stub(server):
    with grpc.insecure_channel(server.address) as channel:
        yield probe_sets_pb2_grpc.ProbeSetsStub(channel)


@pytest.fixture
def store(settings) -> Path:
    return settings.database.parent / "probe-sets"


def upload(stub, parts) -> probe_sets_pb2.ProbeSet:
    with translated():
        return stub.UploadProbeSet(iter(parts), timeout=30)


@contextlib.contextmanager
def translated():
    """Raise what a status says as the error of sedac.errors that it was; its code must be that error's."""
    try:
        yield
    except grpc.RpcError as error:
        status = rpc_status.from_call(error)
        found = wire.error_from_status(status) if status else None
        if found is None:
            raise AssertionError(f"no ErrorInfo: {error}") from error
        raise found from error


def list_files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")} - {"staging", ".lock"}


def get_state(stub, store: Path) -> tuple[str, set[str]]:
    """Everything that a refusal must leave as it was."""
    return str(stub.ListProbeSets(probe_sets_pb2.ListProbeSetsRequest())), list_files(store)


def test_an_uploaded_set_comes_back_byte_for_byte(server, client, stub, store, tmp_path):
    made = make_set()
    answer = client.upload_probe_set(made.write(tmp_path / "mine"))
    assert (answer.name, answer.sha256, answer.size_bytes, answer.author) == ("fresh", made.sha256, len(made.weights), "tester")
    assert (answer.model, answer.num_layers, answer.hidden_size, answer.rank) == ("tiny", 12, 8, 4)
    assert (list(answer.checkpoint_layers), list(answer.levels)) == ([2, 5, 8], ["width-20", "contextual-30"])
    assert answer.state == probe_sets_pb2.PROBE_SET_STATE_LOADABLE, "no engine is connected that could not load it"
    assert client.get_probe_set("fresh") == answer
    assert list(client.list_probe_sets()) == [answer]
    back = client.download_probe_set("fresh", tmp_path / "back", sha256=made.sha256)
    assert ((back / "manifest.json").read_bytes(), (back / "probes.safetensors").read_bytes()) == (made.manifest, made.weights)
    assert list_files(store) == {f"{made.sha256}.safetensors"}
    with pytest.raises(ProbeSetNotFound, match="has sha256"):
        client.download_probe_set("fresh", tmp_path / "other", sha256="0" * 64)
    with pytest.raises(ProbeSetNotFound, match="'nosuch' does not exist; list them, or upload it"):
        client.get_probe_set("nosuch")


def test_sets_are_listed_by_name_and_paged(stub):
    for name in ("b", "c", "a"):
        upload(stub, make_set(name, levels=False).make_parts())
    first = stub.ListProbeSets(probe_sets_pb2.ListProbeSetsRequest(page_size=2))
    rest = stub.ListProbeSets(probe_sets_pb2.ListProbeSetsRequest(page_size=2, page_token=first.next_page_token))
    assert ([s.name for s in first.probe_sets], [s.name for s in rest.probe_sets], rest.next_page_token) == (["a", "b"], ["c"], "")
    for request in (probe_sets_pb2.ListProbeSetsRequest(page_size=-1), probe_sets_pb2.ListProbeSetsRequest(page_token="../x")):
        with pytest.raises(PolicyInvalid), translated():
            stub.ListProbeSets(request)


def test_the_same_again_is_answered_as_before_and_other_content_is_refused(stub, store):
    made = make_set()
    first = upload(stub, made.make_parts())
    assert upload(stub, made.make_parts()) == first
    before = get_state(stub, store)
    for other in (make_set(seed=1), make_set().with_fields(target="something else")):
        with pytest.raises(ProbeSetExists, match="a name is never given twice, choose another"):
            upload(stub, other.make_parts())
    assert get_state(stub, store) == before
    stub.DeleteProbeSet(probe_sets_pb2.DeleteProbeSetRequest(name="fresh"))
    with pytest.raises(ProbeSetExists, match="was there with"):
        upload(stub, make_set(seed=1).make_parts())
    assert upload(stub, made.make_parts()).sha256 == first.sha256


def test_two_names_may_have_the_same_weights(stub, store):
    upload(stub, make_set("con").make_parts())
    upload(stub, make_set("b").make_parts())
    assert len(list_files(store)) == 1
    stub.DeleteProbeSet(probe_sets_pb2.DeleteProbeSetRequest(name="con"))
    assert len(list_files(store)) == 1
    parts = list(stub.DownloadProbeSet(probe_sets_pb2.DownloadProbeSetRequest(name="b")))
    assert b"".join(part.chunk for part in parts[1:]) == make_set("b").weights
    stub.DeleteProbeSet(probe_sets_pb2.DeleteProbeSetRequest(name="b"))
    assert list_files(store) == set()


def test_uploads_of_one_name_at_once_leave_one_content(stub, store):
    sets = [make_set(seed=seed, levels=False) for seed in range(2)]
    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(upload, stub, made.make_parts(64)) for made in sets]
    errors = [result.exception() for result in results if result.exception()]
    assert all(isinstance(error, ProbeSetExists) for error in errors)
    assert len(errors) == 1
    kept = stub.GetProbeSet(probe_sets_pb2.GetProbeSetRequest(name="fresh")).sha256
    assert list_files(store) == {f"{kept}.safetensors"}


def change(made: MadeSet, **fields) -> list:
    return list(made.make_parts(**fields))


GOOD = make_set("hostile")
_FLIPPED = bytearray(GOOD.weights)
_FLIPPED[200] ^= 4
_EVIL = [
    "../x", "..", ".", "/etc/passwd", "a/b", "a\\b", "a\0", "", "A", "con ", "d\u0435mo", "\uff44emo", "\u202edemo", "a" * 65,
    "a" * 100_000, "-rf", "\n",
]  # fmt: skip
_chunk = probe_sets_pb2.UploadProbeSetRequest(chunk=b"x" * 100)
_HOSTILE = [
    *[(change(GOOD, name=name), PolicyInvalid, "header.name") for name in _EVIL],
    *[(change(GOOD.with_fields(name=name), name="hostile"), (ArtifactError, LimitExceeded), "name|control|bytes") for name in _EVIL],
    (change(GOOD, name="other"), PolicyInvalid, "not the manifest's"),
    (change(GOOD, sha256="0" * 64), PolicyInvalid, "header.sha256.*not the manifest's"),
    (change(GOOD, sha256="../" * 20), PolicyInvalid, "header.sha256"),
    (change(GOOD, sha256=GOOD.sha256.upper()), PolicyInvalid, "header.sha256"),
    (change(GOOD, format="torch"), PolicyInvalid, "header.format"),
    (change(GOOD, size_bytes=0), PolicyInvalid, "not over 0"),
    (change(GOOD, size_bytes=-5), PolicyInvalid, "not over 0"),
    (change(GOOD, size_bytes=1 << 62), LimitExceeded, "at most 40000 are taken"),
    (change(GOOD, size_bytes=40_001), LimitExceeded, "at most 40000 are taken"),
    (change(GOOD, size_bytes=len(GOOD.weights) - 1), PolicyInvalid, "announced were"),
    (change(GOOD, size_bytes=len(GOOD.weights) + 1), PolicyInvalid, "send the whole file"),
    (change(GOOD)[:1], PolicyInvalid, "send the whole file"),
    (change(GOOD)[1:], PolicyInvalid, "first message must be a header"),
    ([], PolicyInvalid, "is missing|first message"),
    ([probe_sets_pb2.UploadProbeSetRequest()], PolicyInvalid, "first message must be a header"),
    ([*change(GOOD)[:1], *change(GOOD)], PolicyInvalid, "after the header come chunks"),
    ([*change(GOOD)[:1], probe_sets_pb2.UploadProbeSetRequest(chunk=b"")], PolicyInvalid, "after the header come chunks"),
    ([*change(GOOD)[:1], probe_sets_pb2.UploadProbeSetRequest(chunk=bytes((1 << 20) + 1))], PolicyInvalid, "chunks of 1 to 1048576"),
    ([*change(GOOD), _chunk], PolicyInvalid, "announced were"),
    (change(MadeSet(GOOD.manifest, bytes(_FLIPPED))), ArtifactError, "the manifest says"),
    (change(GOOD.with_weights(bytes(_FLIPPED))), ArtifactError, "copy the probe set again|expected|not promised"),
    (change(GOOD.with_weights(GOOD.weights[:-1])), ArtifactError, "its tensors end at"),
    (change(GOOD.with_weights(b"\x80\x04\x95pickle" * 50)), ArtifactError, "its header has"),
    (change(GOOD.with_weights(pack_raw(b"[" * 5000, b""))), ArtifactError, "its header is not that of safetensors"),
    ([probe_sets_pb2.UploadProbeSetRequest(header=GOOD.make_header(manifest=b"\xff" * 100))], ArtifactError, "is not a probe set's manifest"),
    ([probe_sets_pb2.UploadProbeSetRequest(header=GOOD.make_header(manifest=b"[" * 500_000))], ArtifactError, "is not a probe set's manifest"),
    ([probe_sets_pb2.UploadProbeSetRequest(header=GOOD.make_header(manifest=b" " * 600_000))], LimitExceeded, "at most 524288"),
    (change(GOOD.with_fields(num_layers=10**6)), ArtifactError, "num_layers is out of range: 1000000"),
    (change(GOOD.with_fields(probes=[{"layer": 2, "threshold": float("nan")}])), ArtifactError, "probes.threshold is out of range: nan"),
    (change(GOOD.with_fields(probes=[{"layer": 2, "threshold": float("inf")}])), ArtifactError, "probes.threshold is out of range: inf"),
    (change(make_set("hostile", changes={"2.out.bias": ("F32", (1,), b"\0\0\xc0\x7f")})), ArtifactError, "2.out.bias holds NaN"),
    (change(make_set("hostile", changes={"2.out.bias": ("F32", (1,), b"\0\0\x80\x7f")})), ArtifactError, "2.out.bias holds NaN or inf"),
]  # fmt: skip


@pytest.mark.parametrize(("parts", "kind", "reason"), _HOSTILE, ids=range(len(_HOSTILE)))
def test_hostile_uploads_are_refused_and_leave_no_trace(hostile_server, parts, kind, reason):
    stub, store = hostile_server
    before = get_state(stub, store)
    with pytest.raises(kind, match=reason):
        upload(stub, parts)
    assert get_state(stub, store) == before


def test_every_flipped_header_byte_is_refused_over_the_wire(hostile_server):
    """Each with a digest made for the flipped bytes, every fourth with the digest as it was; a white space for a space is the same set."""
    stub, store = hostile_server
    made = make_set("flipped", (2,), levels=False)
    before, num_refused = get_state(stub, store), 0
    for position in range(8 + int.from_bytes(made.weights[:8], "little")):
        bad = bytearray(made.weights)
        bad[position] ^= 1 << position % 8
        flipped = [] if bad[position : position + 1].isspace() else [made.with_weights(bytes(bad))]
        for sent in flipped + [MadeSet(made.manifest, bytes(bad))] * (position % 4 == 0):
            with pytest.raises(ArtifactError, match="; "):
                upload(stub, sent.make_parts())
            num_refused += 1
    assert get_state(stub, store) == before
    print(f"{num_refused} uploads refused")


@pytest.fixture(scope="module")
def hostile_server(tmp_path_factory):
    """One server for all of them, with a good set in it."""
    directory = tmp_path_factory.mktemp("hostile")
    limits = {"max_probe_set_bytes": 40_000, "max_message_bytes": 1 << 21}
    running = RunningServer(ControlSettings(port=0, metrics_port=0, database=directory / "control.sqlite3", drain_seconds=0.2, **limits))
    with grpc.insecure_channel(running.address) as channel:
        stub = probe_sets_pb2_grpc.ProbeSetsStub(channel)
        upload(stub, BARE.make_parts())
        yield stub, directory / "probe-sets"
    running.stop()


def get_peak_bytes() -> int:
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10


def get_resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_message_of_100_mib_is_refused_before_it_is_held(server, stub, store):
    """Client and server share this process, so what the client sends is counted too, once."""
    message = probe_sets_pb2.UploadProbeSetRequest(chunk=bytes(100 << 20))
    before, peak = get_state(stub, store), get_peak_bytes()
    with pytest.raises(grpc.RpcError) as refused:
        stub.UploadProbeSet(iter([message]), timeout=30)
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in refused.value.details()
    growth = get_peak_bytes() - peak
    print(f"refused; the largest resident size grew by {growth >> 20} MiB, of which the client's copies are 100 to 200")
    assert growth < 400 << 20
    assert get_state(stub, store) == before


def test_what_does_not_fit_beside_the_others_is_refused(stub, store):
    sets = [make_set(name, seed=seed) for seed, name in enumerate("abcd")]
    for made in sets[:3]:
        upload(stub, made.make_parts())
    before = get_state(stub, store)
    with pytest.raises(
        LimitExceeded, match=r"16881 bytes of probe sets are stored or on their way, 5627 more would be over 20000; delete some, or raise"
    ):
        upload(stub, sets[3].make_parts())
    assert get_state(stub, store) == before


def test_only_so_many_uploads_at_a_time_and_a_silent_one_is_given_up(tmp_path):
    quick = ControlSettings(port=0, metrics_port=0, database=tmp_path / "c.sqlite3", drain_seconds=0.2, max_uploads=2, upload_silence_seconds=1.5)
    running, ends, failures = RunningServer(quick), threading.Event(), queue.Queue()
    with grpc.insecure_channel(running.address) as channel:
        stub = probe_sets_pb2_grpc.ProbeSetsStub(channel)

        def dawdle(made: MadeSet) -> None:
            def parts():
                yield next(made.make_parts())
                ends.wait(30)

            with pytest.raises(LimitExceeded) as refused:
                upload(stub, parts())
            failures.put(str(refused.value))

        slow = [threading.Thread(target=dawdle, args=(make_set(name, levels=False),)) for name in ("s1", "s2")]
        for thread in slow:
            thread.start()
        while len(stub.ListProbeSets(probe_sets_pb2.ListProbeSetsRequest()).probe_sets) < 2:
            time.sleep(0.01)
        staged = stub.GetProbeSet(probe_sets_pb2.GetProbeSetRequest(name="s1"))
        assert (staged.state, staged.model) == (probe_sets_pb2.PROBE_SET_STATE_STAGED, "")
        with pytest.raises(LimitExceeded, match="2 uploads run already, which is the limit; call again later"):
            upload(stub, BARE.make_parts())
        for _ in slow:
            assert "too slow: no chunk within 1.5 s" in failures.get(timeout=20)
        ends.set()
        for thread in slow:
            thread.join(10)
        assert upload(stub, BARE.make_parts()).name == "fresh", "the places are free again"
        assert list_files(tmp_path / "probe-sets") == {f"{BARE.sha256}.safetensors"}
    running.stop()


def test_a_caller_that_goes_away_in_the_middle_leaves_nothing(stub, store):
    gone = threading.Event()

    def parts():
        yield from list(BARE.make_parts(100))[:3]
        gone.wait(10)

    call = stub.UploadProbeSet.future(parts())
    deadline = time.monotonic() + 10
    while not (store / "staging").exists() or not list((store / "staging").iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    call.cancel()
    gone.set()
    while list_files(store):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert not stub.ListProbeSets(probe_sets_pb2.ListProbeSetsRequest()).probe_sets


def test_1000_idle_connections_hold_nobody_up(server, stub):
    """Server and connections share this process; the figure is for both ends."""
    host, port = server.address.split(":")
    resident = get_resident_bytes()
    with contextlib.ExitStack() as held:
        for number in range(1000):
            connection = held.enter_context(socket.create_connection((host, int(port)), timeout=10))
            if number % 2:
                connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000"))
        started = time.monotonic()
        upload(stub, BARE.make_parts())
        assert [s.name for s in stub.ListProbeSets(probe_sets_pb2.ListProbeSetsRequest(), timeout=20).probe_sets] == ["fresh"]
        growth = get_resident_bytes() - resident
        print(f"1,000 idle connections: an upload and a list in {time.monotonic() - started:.2f} s, resident size grew by {growth >> 20} MiB")
        assert growth < 500 << 20


def test_links_planted_in_the_store_are_neither_followed_nor_kept(settings, tmp_path):
    store, precious = tmp_path / "probe-sets", tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    (store / "staging").mkdir(parents=True)
    (store / "staging" / "leftover").write_bytes(b"half")
    (store / "staging" / "link").symlink_to(precious)
    (store / f"{BARE.sha256}.safetensors").symlink_to(precious / "file")
    running = RunningServer(settings)
    with grpc.insecure_channel(running.address) as channel:
        stub = probe_sets_pb2_grpc.ProbeSetsStub(channel)
        assert list_files(store) == set(), "what no row tells of is removed at the start"
        upload(stub, BARE.make_parts())
        path = store / f"{BARE.sha256}.safetensors"
        path.unlink()
        path.symlink_to(precious / "file")
        with pytest.raises(grpc.RpcError) as refused:
            list(stub.DownloadProbeSet(probe_sets_pb2.DownloadProbeSetRequest(name="fresh")))
        assert refused.value.code() == grpc.StatusCode.INTERNAL
    running.stop()
    running = RunningServer(settings)
    with grpc.insecure_channel(running.address) as channel:
        stub = probe_sets_pb2_grpc.ProbeSetsStub(channel)
        assert not stub.ListProbeSets(probe_sets_pb2.ListProbeSetsRequest()).probe_sets, "a row without its file can't be named"
        assert upload(stub, BARE.make_parts()).sha256 == BARE.sha256
    running.stop()
    assert (precious / "file").read_text() == "mine"


@pytest.mark.parametrize("link", ["probe-sets", "probe-sets/staging"])
def test_a_store_that_is_a_link_is_refused(settings, tmp_path, link):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="is a link; name a directory of this service alone in SEDAC_CONTROL_PROBE_SETS"):
        RunningServer(settings)


def test_two_services_do_not_share_a_store(server, settings, tmp_path):
    with pytest.raises(ConfigError, match="in use by another control service"):
        RunningServer(settings.model_copy(update={"database": tmp_path / "other.sqlite3"}))


def test_sets_survive_a_restart(settings, tmp_path):
    running = RunningServer(settings)
    with ControlClient(running.address, author="ann") as client:
        made = client.upload_probe_set(make_set().write(tmp_path / "mine"))
        client.upload_probe_set(make_set("gone", seed=3).write(tmp_path / "gone"))
        client.delete_probe_set("gone")
    running.stop()
    running = RunningServer(settings)
    with ControlClient(running.address) as client:
        assert list(client.list_probe_sets()) == [made]
        with pytest.raises(ProbeSetNotFound, match="does not exist any more"):
            client.get_probe_set("gone")
        client.download_probe_set("fresh", tmp_path / "back")
        actions = [(entry.action, entry.resource, entry.author) for entry in client.list_audit_entries()]
    running.stop()
    assert actions == [
        ("DeleteProbeSet", "probe-sets/gone", "ann"),
        ("UploadProbeSet", "probe-sets/gone", "ann"),
        ("UploadProbeSet", "probe-sets/fresh", "ann"),
    ]
    assert verify((tmp_path / "back" / "manifest.json").read_bytes(), tmp_path / "back" / "probes.safetensors").manifest.name == "fresh"


def test_who_can_load_a_set_is_told_engine_by_engine(client, stub, make_engine):
    make_engine("small", max_rank=4).pushes.get(timeout=10)
    make_engine("tiny", max_rank=2).pushes.get(timeout=10)
    answer = upload(stub, BARE.make_parts())
    assert answer.state == probe_sets_pb2.PROBE_SET_STATE_LOADABLE
    fits = {fit.engine_id: fit.problem for fit in answer.engines}
    assert fits["small"] == ""
    assert re.search("its rank 4 is over 2, .*; restart", fits["tiny"])
    answer = upload(stub, make_set("wide", rank=8, levels=False).make_parts())
    assert answer.state == probe_sets_pb2.PROBE_SET_STATE_VERIFIED
    with pytest.raises(PolicyInvalid, match=r"probe_set: 'wide' can't be loaded: its rank 8 is over"):
        client.update_policy(Policy(probe_set="wide", checkpoints=CHECKPOINTS))
    assert client.get_policy().revision == 1


def test_a_policy_names_an_uploaded_set_and_the_engine_is_sent_where_to_fetch_it(client, stub, make_engine):
    engine = make_engine()
    assert not engine.pushes.get(timeout=10).probe_sets
    with pytest.raises(PolicyInvalid, match=r"probe_set: 'fresh' is neither attached \('demo' is\) nor uploaded; upload it"):
        client.update_policy(NAMED)
    upload(stub, BARE.make_parts())
    made = client.update_policy(NAMED)
    push = engine.pushes.get(timeout=10)
    assert (push.policy.revision, push.policy.probe_set) == (made.revision, "fresh")
    assert [(r.name, r.sha256, r.size_bytes) for r in push.probe_sets] == [("fresh", BARE.sha256, len(BARE.weights))]
    client.wait_until_synced(made.revision, 10)
    assert set(client.get_probe_set("fresh").referenced_by) == {"policies/default", "engines/e1"}
    upload(stub, make_set("part", (5,), levels=False).make_parts())
    with pytest.raises(PolicyInvalid, match=r"checkpoints\[0\].layer: 2 has no probe in 'part' \(it has 5\)"):
        client.update_policy(Policy(probe_set="part", checkpoints=CHECKPOINTS))


def test_the_name_that_an_engine_started_with_is_not_given_to_another_set(client, stub, make_engine):
    make_engine().pushes.get(timeout=10)
    with pytest.raises(ProbeSetExists, match="engine e1 started with another set named 'demo'"):
        upload(stub, make_set("demo", levels=False).make_parts())
    assert client.update_policy(Policy(probe_set="demo", checkpoints=CHECKPOINTS)).revision == 2


def test_a_set_in_use_is_not_deleted_and_a_deleted_one_is_not_named(client, stub, make_engine, store):
    engine = make_engine()
    engine.pushes.get(timeout=10)
    upload(stub, BARE.make_parts())
    named = client.update_policy(NAMED)
    client.wait_until_synced(named.revision, 10)
    with pytest.raises(ProbeSetInUse, match=r"'fresh' is used by policies/default, engines/e1; name another set there first"):
        client.delete_probe_set("fresh")
    engine.answers = False  # the next revision stays unanswered, so the engine still runs the one before
    after = client.update_policy(Policy(enabled=True, checkpoints=CHECKPOINTS))
    push = engine.pushes.get(timeout=10)
    while push.policy.revision != after.revision:
        push = engine.pushes.get(timeout=10)
    with pytest.raises(ProbeSetInUse, match=r"'fresh' is used by engines/e1"):
        client.delete_probe_set("fresh")
    engine.answer(push)
    client.wait_until_synced(after.revision, 10)
    client.delete_probe_set("fresh")
    assert list_files(store) == set()
    with pytest.raises(PolicyInvalid, match=r"probe_set: 'fresh' was deleted; upload it again \(sha256 [0-9a-f]{12}\.\.\.\), or name another set"):
        client.rollback(named.revision)
    assert client.get_policy().revision == after.revision
    upload(stub, BARE.make_parts())
    assert client.rollback(named.revision).revision == after.revision + 1


def test_a_rollback_to_a_deleted_set_is_refused_without_engines_too(client, stub):
    upload(stub, BARE.make_parts())
    named = client.update_policy(NAMED)
    client.update_policy(Policy(checkpoints=CHECKPOINTS))
    client.delete_probe_set("fresh")
    with pytest.raises(PolicyInvalid, match="'fresh' was deleted; upload it again"):
        client.rollback(named.revision)


def test_certificates_are_held_against_the_set_that_is_named(client, stub, make_engine):
    upload(stub, BARE.make_parts())
    engine = make_engine()
    engine.pushes.get(timeout=10)
    with pytest.raises(PolicyInvalid, match=r"certificate.probe_set_sha256: 222222222222\.\.\., the engine has"):
        client.update_policy(certify(NAMED))
    assert client.update_policy(certify(NAMED, probe_set=BARE.sha256)).HasField("certificate")
    engine.close()
    make_engine("levelled", levels=("full", "width-20", "skip"), levels_sha256="5" * 64).pushes.get(timeout=10)
    client.update_policy(NAMED)
    with pytest.raises(PolicyInvalid, match=r"certificate.probe_set_sha256: .*'fresh' has no levels of its own"):
        client.update_policy(certify(NAMED, probe_set=BARE.sha256))


def test_kill_9_in_the_middle_leaves_whole_sets_alone(tmp_path):
    """What was acknowledged is there after it, whole, and nothing else."""
    from tests.control.test_server import _kill_when, _serving

    path, acknowledged = tmp_path / "control.sqlite3", []
    for round_number in range(3):
        with _serving(path) as (process, address), grpc.insecure_channel(address) as channel:
            stub = probe_sets_pb2_grpc.ProbeSetsStub(channel)
            killer = threading.Thread(target=_kill_when, args=(process, acknowledged, len(acknowledged) + 3 + 2 * round_number))
            killer.start()
            with contextlib.suppress(grpc.RpcError):
                for number in range(1000):
                    made = make_set(f"s{round_number}-{number}", levels=False, seed=1000 * round_number + number)
                    stub.UploadProbeSet(made.make_parts(200), timeout=10)
                    acknowledged.append(made)
            process.wait(10)
            killer.join()
    with _serving(path) as (_, address), ControlClient(address) as client:
        found = {probe_set.name: probe_set.sha256 for probe_set in client.list_probe_sets()}
        assert {made.fields["name"] for made in acknowledged} <= set(found)
        assert len(found) <= len(acknowledged) + 3, "only the one in flight at each kill may be there beside"
        assert list_files(tmp_path / "probe-sets") == {f"{sha256}.safetensors" for sha256 in found.values()}
        for made in acknowledged[-3:]:
            back = client.download_probe_set(made.fields["name"], tmp_path / "back" / made.fields["name"])
            assert (back / "probes.safetensors").read_bytes() == made.weights
    assert len(acknowledged) >= 15
    print(f"{len(acknowledged)} acknowledged uploads over 3 kills")


def test_the_event_loop_goes_on_while_a_set_is_verified(server, stub, monkeypatch):
    """A verification that waits for a status call to be answered."""
    started, answered = threading.Event(), threading.Event()
    store = server.server._probe_sets
    verify_set = store.verify

    def wait(*values):
        started.set()
        assert answered.wait(20), "nobody was answered meanwhile"
        return verify_set(*values)

    monkeypatch.setattr(store, "verify", wait)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(upload, stub, BARE.make_parts())
        assert started.wait(20)
        stub.ListProbeSets(probe_sets_pb2.ListProbeSetsRequest(), timeout=20)
        answered.set()
        assert result.result(20).name == "fresh"
