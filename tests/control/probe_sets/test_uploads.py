"""Probe sets over the wire: what is uploaded is there whole, to be named and fetched, whatever comes between."""

from __future__ import annotations

import contextlib
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from sedac.client.client import ControlClient
from sedac.contract.v1 import probe_sets_pb2, probe_sets_pb2_grpc
from sedac.errors import (
    PolicyInvalid,
    ProbeSetExists,
    ProbeSetNotFound,
)
from sedac.probe.verify import verify

from testing.control.processes import ControlProcess
from testing.control.running import RunningServer
from testing.control.uploads import BARE, get_state, list_files, translated, upload
from testing.probe_sets import make_set


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


def test_kill_9_in_the_middle_leaves_whole_sets_alone(tmp_path):
    """What was acknowledged is there after it, whole, and nothing else."""
    path, acknowledged = tmp_path / "control.sqlite3", []
    for round_number in range(3):
        with ControlProcess(path) as service, grpc.insecure_channel(service.address) as channel:
            stub = probe_sets_pb2_grpc.ProbeSetsStub(channel)
            length = len(acknowledged) + 3 + 2 * round_number
            killer = service.kill_once(lambda length=length: len(acknowledged) >= length)
            with contextlib.suppress(grpc.RpcError):
                for number in range(1000):
                    made = make_set(f"s{round_number}-{number}", levels=False, seed=1000 * round_number + number)
                    stub.UploadProbeSet(made.make_parts(200), timeout=10)
                    acknowledged.append(made)
            assert service.process.wait(10) == -signal.SIGKILL
            killer.join()
    with ControlProcess(path) as service, ControlClient(service.address) as client:
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
