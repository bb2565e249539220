"""Fetching probe sets: whole and verified in the cache, or not in it, whatever answers under the control service's address."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures

import grpc
import pytest
from sedac.agent import fetch as fetching
from sedac.agent.fetch import NUM_KEPT, FetchedSet, fetch
from sedac.contract.v1 import control_pb2, probe_sets_pb2, probe_sets_pb2_grpc
from sedac.errors import ArtifactError

from testing.control.fixtures import client, server, settings  # noqa: F401
from testing.probe_sets import MadeSet, make_set

GOOD = make_set()
Part = probe_sets_pb2.DownloadProbeSetResponse


def refer(made: MadeSet, **changes) -> control_pb2.ProbeSetReference:
    stated = {"name": made.fields["name"], "sha256": made.sha256, "size_bytes": len(made.weights)}
    return control_pb2.ProbeSetReference(**(stated | changes))


def run_fetch(address: str, reference: control_pb2.ProbeSetReference, cache) -> FetchedSet:
    async def run() -> FetchedSet:
        async with grpc.aio.insecure_channel(address) as channel:
            return await fetch(channel, reference, cache)

    return asyncio.run(run())


def make_answer(made: MadeSet, chunk_bytes: int = 1000, **changes) -> list[Part]:
    parts = [Part(header=made.make_header(**changes))]
    return parts + [Part(chunk=made.weights[at : at + chunk_bytes]) for at in range(0, len(made.weights), chunk_bytes)]


@contextlib.contextmanager
def answering(answer: Callable[[], Iterable[Part]]) -> Iterator[tuple[str, list]]:
    """A service that sends whatever it is told; yields its address and the requests that came."""
    requests: list[probe_sets_pb2.DownloadProbeSetRequest] = []

    class Servicer(probe_sets_pb2_grpc.ProbeSetsServicer):
        def DownloadProbeSet(self, request, context):  # noqa: N802
            requests.append(request)
            yield from answer()

    running = grpc.server(futures.ThreadPoolExecutor(2))
    probe_sets_pb2_grpc.add_ProbeSetsServicer_to_server(Servicer(), running)
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    try:
        yield f"127.0.0.1:{port}", requests
    finally:
        running.stop(0).wait(5)


def test_what_was_uploaded_is_fetched_whole_and_only_once(server, client, tmp_path):  # noqa: F811
    client.upload_probe_set(GOOD.write(tmp_path / "mine"))
    cache = tmp_path / "cache" / "deep"
    found = run_fetch(server.address, refer(GOOD), cache)
    assert found.directory == cache / GOOD.sha256
    assert (found.summary.name, found.summary.rank, found.summary.checkpoint_layers) == ("fresh", 4, (2, 5, 8))
    assert (found.directory / "manifest.json").read_bytes() == GOOD.manifest
    assert (found.directory / "probes.safetensors").read_bytes() == GOOD.weights
    assert stat.S_IMODE(found.directory.stat().st_mode) == 0o700
    client.delete_probe_set("fresh")
    assert run_fetch(server.address, refer(GOOD), cache) == found, "the cache needs no service"
    other = make_set("other", seed=5)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        run_fetch(server.address, refer(other), cache)
    assert refused.value.code() == grpc.StatusCode.NOT_FOUND
    assert os.listdir(cache) == [GOOD.sha256]


_other = make_set(seed=1)
_nan = make_set(changes={"2.out.bias": ("F32", (1,), b"\0\0\xc0\x7f")})


@pytest.mark.parametrize(
    ("reference", "answer", "reason"),
    [
        (refer(GOOD), [], "0 bytes of weights; announced were"),
        (refer(GOOD), [Part()], "a header of ''"),
        (refer(GOOD), make_answer(GOOD)[1:], "a header of ''"),
        (refer(GOOD), make_answer(GOOD)[:1], "0 bytes of weights; announced were"),
        (refer(GOOD), make_answer(GOOD)[:-1], "bytes of weights; announced were"),
        (refer(GOOD), [*make_answer(GOOD), Part(chunk=b"x")], r"a part with 1 bytes of weights"),
        (refer(GOOD), [*make_answer(GOOD)[:2], Part(chunk=b""), *make_answer(GOOD)[2:]], "a part with 0 bytes"),
        (refer(GOOD), [make_answer(GOOD)[0], *make_answer(GOOD)], "a part with 0 bytes"),
        (refer(GOOD), make_answer(GOOD, name="../x"), "a header of '../x'"),
        (refer(GOOD), make_answer(GOOD, sha256="0" * 64), "a header of 'fresh'"),
        (refer(GOOD), make_answer(GOOD, size_bytes=1), "a header of 'fresh', 1 bytes"),
        (refer(GOOD), make_answer(GOOD, format="pickle"), "format 'pickle'"),
        (refer(GOOD), make_answer(GOOD, manifest=b"x" * 600_000), "a manifest of 600000 bytes"),
        (refer(GOOD), make_answer(GOOD, manifest=b"\xff"), "is not a probe set's manifest"),
        (refer(GOOD), make_answer(GOOD, manifest=_other.manifest), "the manifest says"),
        (refer(GOOD), make_answer(GOOD, manifest=make_set("other").manifest), "the manifest of 'other'"),
        (refer(GOOD), [make_answer(GOOD)[0], *make_answer(_other)[1:]], "the manifest says"),
        (refer(_nan), make_answer(_nan), "2.out.bias holds NaN or infinity"),
        (refer(GOOD, size_bytes=1 << 62), make_answer(GOOD), "has room for"),
        (refer(GOOD, size_bytes=0), make_answer(GOOD), "announced 0 bytes"),
        (refer(GOOD, sha256="../../etc"), make_answer(GOOD), r"announced sha256 '\.\./\.\./etc'"),
        (refer(GOOD, sha256=""), make_answer(GOOD), "announced sha256 ''"),
    ],
)
def test_a_service_that_sends_something_else_is_refused_and_nothing_is_kept(tmp_path, reference, answer, reason):
    cache = tmp_path / "cache"
    cache.mkdir()
    with answering(lambda: answer) as (address, _), pytest.raises(ArtifactError, match=reason):
        run_fetch(address, reference, cache)
    assert os.listdir(cache) == []


def test_a_service_that_sends_without_end_is_cut_off_at_the_announced_size(tmp_path):
    num_sent = 0

    def answer():
        nonlocal num_sent
        yield make_answer(GOOD)[0]
        while True:
            num_sent += 1
            yield Part(chunk=bytes(4000))

    with answering(answer) as (address, _), pytest.raises(ArtifactError, match="announced were"):
        run_fetch(address, refer(GOOD), tmp_path)
    assert os.listdir(tmp_path) == []
    print(f"cut off after {num_sent} chunks were sent")


def test_a_service_that_goes_silent_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "_SILENCE_SECONDS", 0.3)

    def answer():
        yield from make_answer(GOOD)[:2]
        time.sleep(3)

    with answering(answer) as (address, _), pytest.raises(TimeoutError, match="sent nothing for"):
        run_fetch(address, refer(GOOD), tmp_path)
    assert os.listdir(tmp_path) == []


def _flip(directory):
    path = directory / "probes.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def _link(directory):
    directory.rename(directory.parent.parent / "moved")
    directory.symlink_to(directory.parent.parent / "moved")


def _link_weights(directory):
    (directory / "probes.safetensors").rename(directory.parent.parent / "moved")
    (directory / "probes.safetensors").symlink_to(directory.parent.parent / "moved")


@pytest.mark.parametrize(
    "damage",
    [
        _flip,
        _link,
        _link_weights,
        lambda d: (d / "manifest.json").unlink(),
        lambda d: (d / "manifest.json").write_bytes(make_set("other").manifest),
        lambda d: ((d / "manifest.json").unlink(), os.mkfifo(d / "manifest.json")),
    ],
)
def test_a_damaged_or_planted_entry_is_fetched_again(tmp_path, damage):
    cache = tmp_path / "cache"
    with answering(lambda: make_answer(GOOD)) as (address, requests):
        directory = run_fetch(address, refer(GOOD), cache).directory
        damage(directory)
        run_fetch(address, refer(GOOD), cache)
        assert len(requests) == 2
    assert stat.S_ISDIR(directory.lstat().st_mode)
    assert not (directory / "probes.safetensors").is_symlink()
    assert (directory / "probes.safetensors").read_bytes() == GOOD.weights


def test_what_a_link_leads_to_stays_and_old_leftovers_go(tmp_path):
    cache, precious = tmp_path / "cache", tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    cache.mkdir()
    (cache / GOOD.sha256).symlink_to(precious)
    (cache / ".incoming-link").symlink_to(precious)
    os.utime(cache / ".incoming-link", (0, 0), follow_symlinks=False)
    (cache / ".incoming-old").mkdir()
    os.utime(cache / ".incoming-old", (0, 0))
    (cache / ".incoming-another-engines").mkdir()
    with answering(lambda: make_answer(GOOD)) as (address, _):
        run_fetch(address, refer(GOOD), cache)
    assert set(os.listdir(cache)) == {GOOD.sha256, ".incoming-another-engines"}
    assert (precious / "file").read_text() == "mine"


def test_the_newest_used_sets_are_kept(tmp_path):
    sets = [make_set(f"s{number}", levels=False, seed=number) for number in range(NUM_KEPT + 2)]
    for age, made in enumerate(sets):
        with answering(lambda made=made: make_answer(made)) as (address, _):
            directory = run_fetch(address, refer(made), tmp_path).directory
        os.utime(directory, (1000 + age, 1000 + age))
        if age == NUM_KEPT:
            with answering(list) as (address, requests):  # the oldest that is still there is used again
                run_fetch(address, refer(sets[1]), tmp_path)
                assert not requests
    kept = set(os.listdir(tmp_path))
    assert kept == {made.sha256 for made in [sets[1], *sets[3:]]}


def test_engines_that_fetch_at_once_share_one_cache(tmp_path):
    async def run(address: str) -> list[FetchedSet]:
        async with grpc.aio.insecure_channel(address) as channel:
            return await asyncio.gather(*(fetch(channel, refer(GOOD), tmp_path) for _ in range(8)))

    with answering(lambda: make_answer(GOOD, 100)) as (address, _):
        found = asyncio.run(run(address))
    assert {each.directory for each in found} == {tmp_path / GOOD.sha256}
    assert os.listdir(tmp_path) == [GOOD.sha256]
