"""Uploads that are refused, for what they are or for want of room, leave nothing behind and hold nobody up."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import socket
import threading
import time
from pathlib import Path

import grpc
import pytest
from sedac.contract.v1 import probe_sets_pb2, probe_sets_pb2_grpc
from sedac.control.base.settings import ControlSettings
from sedac.errors import ArtifactError, ConfigError, LimitExceeded, PolicyInvalid

from testing.control.running import RunningServer
from testing.control.uploads import BARE, get_state, list_files, upload
from testing.probe_sets import MadeSet, make_set, pack_raw


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
