"""What was acknowledged is there: histories of changes, watches and crashes of a real control service, against a small model."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sedac.client.client import ControlClient
from sedac.contract import wire
from sedac.contract.v1 import control_pb2, control_pb2_grpc
from sedac.errors import (
    ControlUnavailable,
    PolicyInvalid,
    ProbeSetExists,
    ProbeSetInUse,
    ProbeSetNotFound,
    RevisionCompacted,
    RevisionNotFound,
    StaleEtag,
)
from sedac.policy.model import Checkpoint, Policy

from testing.control.processes import ControlProcess
from testing.probe_sets import MadeSet, make_set
from testing.strategies import valid_policies

_KEEP = 10
_SET_NAMES = st.sampled_from(["a", "b"])


class Model:
    """What the service must hold: every acknowledged revision as it was acknowledged, of which the newest are kept."""

    def __init__(self) -> None:
        self.made: list[control_pb2.Policy] = []
        self.requests: dict[str, tuple[Policy, str, control_pb2.Policy]] = {}
        """by request_id: policy and etag that were sent, and the answer"""
        self.sets: dict[str, MadeSet] = {}
        """probe sets that are there"""
        self.owners: dict[str, MadeSet] = {}
        """what a name belongs to, also when its set was deleted"""

    @property
    def newest(self) -> int:
        return len(self.made)

    @property
    def oldest(self) -> int:
        """The oldest revision that is kept."""
        return max(1, self.newest - _KEEP + 1)

    def keep(self, made: control_pb2.Policy) -> None:
        assert made.revision == self.newest + 1, "numbers only grow, by one"
        assert made.etag not in {p.etag for p in self.made}
        self.made.append(made)

    def can_name(self, probe_set: str) -> bool:
        """Whether a policy may name a probe set: not one that was deleted, unless it is in force already."""
        in_force = self.made[-1].probe_set if self.made else None
        return probe_set not in self.owners or probe_set in self.sets or probe_set == in_force

    def list(self) -> list[control_pb2.Policy]:
        return self.made[self.oldest - 1 :]


class ControlHistory(RuleBasedStateMachine):
    """Changes, repeats, rollbacks, watches and probe sets over the wire, with crashes in between and in the middle of writes."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.model = Model()
        self._numbers = itertools.count()
        self.seen = 0
        """up to which revision the watcher came that is broken off and resumed"""

    @initialize()
    def start(self):
        self.service = ControlProcess(Path(self.directory.name) / "control.sqlite3", SEDAC_CONTROL_KEEP_REVISIONS=str(_KEEP))
        self._connect()

    def _connect(self) -> None:
        self.client = ControlClient(self.service.address, author="history", num_retries=0)
        self.fetched: set[str] = set()
        """what was downloaded from this process"""
        self.channel = grpc.insecure_channel(self.service.address)
        self.stub = control_pb2_grpc.ControlStub(self.channel)

    @rule(policy=valid_policies(), guard=st.sampled_from(["none", "good", "stale"]), named=st.booleans())
    def update(self, policy, guard, named):
        etag = {"none": "", "good": self.model.made[-1].etag if self.model.made else "", "stale": "stale"}[guard]
        request_id = f"r{len(self.model.requests)}" if named else ""
        if guard == "stale":
            with pytest.raises(StaleEtag):
                self.client.update_policy(policy, etag=etag, request_id=request_id)
            return
        made = self.client.update_policy(policy, etag=etag, request_id=request_id)
        assert wire.policy_from_proto(made) == policy
        self.model.keep(made)
        if named:
            self.model.requests[request_id] = (policy, etag, made)

    @rule(layer=st.integers(-3, -1))
    def update_badly(self, layer):
        with pytest.raises(PolicyInvalid):
            self.client.update_policy(Policy(checkpoints=(Checkpoint(layer=layer, threshold=1),)))

    @precondition(lambda self: self.model.requests)
    @rule(data=st.data())
    def repeat(self, data):
        """A request that was carried out is answered again, whatever came after it, and not carried out again."""
        request_id = data.draw(st.sampled_from(sorted(self.model.requests)))
        policy, etag, first = self.model.requests[request_id]
        try:
            assert self.client.update_policy(policy, etag=etag, request_id=request_id) == first
        except RevisionCompacted:
            assert first.revision < self.model.oldest

    @rule(data=st.data())
    def roll_back(self, data):
        revision = data.draw(st.integers(1, self.model.newest + 2))
        if revision > self.model.newest:
            with pytest.raises(RevisionNotFound):
                self.client.rollback(revision)
        elif revision < self.model.oldest:
            with pytest.raises(RevisionCompacted):
                self.client.rollback(revision)
        elif not self.model.can_name(self.model.made[revision - 1].probe_set):
            with pytest.raises(PolicyInvalid, match="was deleted; upload it again"):
                self.client.rollback(revision)
        else:
            made = self.client.rollback(revision)
            assert wire.policy_from_proto(made) == wire.policy_from_proto(self.model.made[revision - 1])
            self.model.keep(made)

    @rule(name=_SET_NAMES)
    def name_a_probe_set(self, name):
        policy = Policy(probe_set=name)
        if self.model.can_name(name):
            self.model.keep(self.client.update_policy(policy))
        else:
            with pytest.raises(PolicyInvalid, match="was deleted; upload it again"):
                self.client.update_policy(policy)

    @rule(name=_SET_NAMES, seed=st.integers(0, 1))
    def upload(self, name, seed):
        made = make_set(name, seed=seed)
        if self.model.owners.setdefault(name, made) != made:
            with pytest.raises(ProbeSetExists):
                self._upload(made)
        else:
            assert self._upload(made).sha256 == made.sha256
            self.model.sets[name] = made

    @rule(name=_SET_NAMES)
    def delete(self, name):
        if name not in self.model.sets:
            with pytest.raises(ProbeSetNotFound):
                self.client.delete_probe_set(name)
        elif self.model.made and self.model.made[-1].probe_set == name:
            with pytest.raises(ProbeSetInUse):
                self.client.delete_probe_set(name)
        else:
            self.client.delete_probe_set(name)
            del self.model.sets[name]

    @rule(name=_SET_NAMES, milliseconds=st.integers(0, 20))
    def crash_while_uploading(self, name, milliseconds):
        made = self.model.owners.get(name) or make_set(name)

        def upload() -> None:
            with contextlib.suppress(ControlUnavailable):
                self._upload(made)
                self.model.sets[name] = self.model.owners[name] = made

        self._crash_during(upload, milliseconds)
        if name in {found.name for found in self.client.list_probe_sets()}:  # stored, whole, though perhaps not acknowledged
            self.model.sets[name] = self.model.owners[name] = made

    def _upload(self, made: MadeSet):
        return self.client.upload_probe_set(made.write(Path(self.directory.name) / made.sha256))

    @rule()
    def resume_the_watch(self):
        watch = self.stub.WatchPolicy(control_pb2.WatchPolicyRequest(from_revision=self.seen + 1), timeout=30)
        if self.seen + 1 < self.model.oldest:
            with pytest.raises(grpc.RpcError) as ended:
                next(watch)
            assert ended.value.code() == grpc.StatusCode.OUT_OF_RANGE
            self.seen = self.model.oldest - 1
            return
        while self.seen < self.model.newest:
            assert next(watch) == self.model.made[self.seen], "in order, without a gap, as acknowledged"
            self.seen += 1
        watch.cancel()

    @rule()
    def crash(self):
        self._close()
        self.service.restart()
        self._connect()

    @rule(num_writes=st.integers(1, 30), milliseconds=st.integers(0, 20))
    def crash_while_writing(self, num_writes, milliseconds):
        acknowledged: list[control_pb2.Policy] = []

        def write() -> None:
            with contextlib.suppress(ControlUnavailable):  # the crash; what was acknowledged before is checked
                for number in range(num_writes):
                    acknowledged.append(self.client.update_policy(_make_policy(number), comment=f"write {number}"))

        self._crash_during(write, milliseconds)
        for made in acknowledged:
            self.model.keep(made)
        try:
            stored = self.client.get_policy()
        except RevisionNotFound:
            stored = control_pb2.Policy()
        if stored.revision > self.model.newest:  # the write in flight: whole, or not there
            assert stored.comment == f"write {len(acknowledged)}"
            assert wire.policy_from_proto(stored) == _make_policy(len(acknowledged))
            self.model.keep(stored)

    def _crash_during(self, act: Callable[[], None], milliseconds: int) -> None:
        actor = threading.Thread(target=act)
        actor.start()
        time.sleep(milliseconds / 1000)
        self.service.kill()
        actor.join()
        self._close()
        self.service.start()
        self._connect()

    @invariant()
    def holds_what_the_model_holds(self):
        assert list(self.client.list_revisions()) == self.model.list()[::-1]
        if self.model.made:
            assert self.client.get_policy() == self.model.made[-1]
        assert {found.name: found.sha256 for found in self.client.list_probe_sets()} == {n: made.sha256 for n, made in self.model.sets.items()}
        for name, made in self.model.sets.items():
            if made.sha256 in self.fetched:
                continue
            self.fetched.add(made.sha256)
            directory = Path(self.directory.name) / "downloads" / str(next(self._numbers))
            self.client.download_probe_set(name, directory)
            assert (directory / "probes.safetensors").read_bytes() == made.weights
            assert (directory / "manifest.json").read_bytes() == made.manifest

    def _close(self) -> None:
        self.client.__exit__(None, None, None)
        self.channel.close()

    def teardown(self):
        if hasattr(self, "service"):
            self._close()
            self.service.kill()
        self.directory.cleanup()


TestControlHistory = ControlHistory.TestCase
TestControlHistory.settings = settings(max_examples=1, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))


class LongControlHistory(ControlHistory):
    """The same, five times."""


TestLongControlHistory = pytest.mark.thorough(LongControlHistory.TestCase)
TestLongControlHistory.settings = settings(TestControlHistory.settings, max_examples=5)


def _make_policy(number: int) -> Policy:
    return Policy(checkpoints=tuple(Checkpoint(layer=layer, threshold=number) for layer in range(20)))


class _Kills:
    """A service that is killed at random points until it has had enough; whoever finds it gone asks where it is now."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.service, self._random = ControlProcess(directory / "control.sqlite3"), random.Random(seed)
        self.num_acknowledged, self._lock = 0, threading.Lock()

    def count(self) -> None:
        with self._lock:
            self.num_acknowledged += 1

    def kill(self, points: list[int]) -> None:
        for point in points:
            while self.num_acknowledged < point:
                time.sleep(0.0005)
            time.sleep(self._random.uniform(0, 0.01))
            self.service.restart()


@pytest.mark.parametrize(("num_writes", "num_kills"), [(60, 3), pytest.param(200, 8, marks=pytest.mark.thorough)])
def test_writes_of_several_threads_survive_kills_at_random_points(tmp_path, request, num_writes, num_kills):
    """Each is there, whole, once; those who watch see all of them in order, whoever was killed in between."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    kills, made, watched = _Kills(tmp_path, seed), {}, [[], []]
    request.addfinalizer(kills.service.kill)

    def write(writer: int) -> None:
        for number in range(num_writes // 4):
            while True:  # the same request until it is answered, as the contract offers it
                try:
                    with ControlClient(kills.service.address, timeout_seconds=5, num_retries=0) as client:
                        made[writer, number] = client.update_policy(_make_policy(writer * num_writes // 4 + number), request_id=f"{writer}-{number}")
                    break
                except ControlUnavailable:
                    time.sleep(0.01)
            kills.count()

    def watch(seen: list[control_pb2.Policy]) -> None:
        while len(seen) < num_writes:
            with grpc.insecure_channel(kills.service.address) as channel:
                stream = control_pb2_grpc.ControlStub(channel).WatchPolicy(control_pb2.WatchPolicyRequest(from_revision=len(seen) + 1), timeout=5)
                try:
                    while len(seen) < num_writes:
                        seen.append(next(stream))
                except grpc.RpcError:  # killed; what it missed shows in the end
                    time.sleep(0.01)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    threads += [threading.Thread(target=watch, args=(seen,)) for seen in watched]
    for thread in threads:
        thread.start()
    kills.kill(sorted(random.Random(seed).sample(range(1, num_writes - 5), num_kills)))
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    with ControlClient(kills.service.address) as client:
        stored = list(client.list_revisions())[::-1]
    assert [p.revision for p in stored] == list(range(1, num_writes + 1))
    assert sorted(made.values(), key=lambda p: p.revision) == stored, "every acknowledged write is there as it was acknowledged, and nothing twice"
    assert sorted(p.checkpoints[0].threshold for p in stored) == list(range(num_writes))
    assert all(len(p.checkpoints) == 20 and len({c.threshold for c in p.checkpoints}) == 1 for p in stored), "none is half written"
    assert watched == [stored, stored]


@pytest.mark.parametrize("num_races", [200, pytest.param(1000, marks=pytest.mark.thorough)])
def test_of_two_writers_with_one_etag_exactly_one_wins(server, num_races):
    async def race() -> None:
        async with grpc.aio.insecure_channel(server.address) as left, grpc.aio.insecure_channel(server.address) as right:
            stubs = [control_pb2_grpc.ControlStub(channel) for channel in (left, right)]
            now = await stubs[0].UpdatePolicy(control_pb2.UpdatePolicyRequest(policy=wire.policy_to_proto(Policy())))
            for number in range(num_races):
                calls = []
                for writer, stub in enumerate(stubs):
                    policy = wire.policy_to_proto(Policy(), etag=now.etag, comment=str(writer))
                    calls.append(stub.UpdatePolicy(control_pb2.UpdatePolicyRequest(policy=policy)))
                answers = await asyncio.gather(*calls, return_exceptions=True)
                winners = [(w, a) for w, a in enumerate(answers) if isinstance(a, control_pb2.Policy)]
                losers = [a for a in answers if isinstance(a, grpc.aio.AioRpcError)]
                assert len(winners) == len(losers) == 1
                assert losers[0].code() == grpc.StatusCode.ABORTED
                ((writer, now),) = winners
                assert (now.revision, now.comment) == (number + 2, str(writer))

    asyncio.run(race())
