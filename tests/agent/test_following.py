"""What the service pushes, on a real stream from a service that says what a test wants: sides, refusals by field, joining, a last good policy."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc
import pytest
from google.rpc import error_details_pb2
from sedac import __version__
from sedac.agent import following
from sedac.agent.agent import Agent
from sedac.agent.engine import AttachedEngine
from sedac.agent.metrics import EngineMetrics
from sedac.agent.pushes import find_probe_cache
from sedac.agent.status import describe_agent
from sedac.contract import wire
from sedac.contract.v1 import control_pb2, control_pb2_grpc, probe_sets_pb2, probe_sets_pb2_grpc
from sedac.errors import ConfigError
from sedac.policy.model import Checkpoint, Policy, Tier
from sedac.settings import EngineSettings

from testing.control.engines import FIRST
from testing.figures import get_metric
from testing.probe_sets import MadeSet, make_set
from testing.strategies import certify
from testing.workers import LAYOUT, Workers

OTHER = Policy(enabled=True, checkpoints=(Checkpoint(layer=8, threshold=0.125),), tiers=(Tier(name="mine"),), default_tier="mine")
ROOMY = replace(LAYOUT, max_rank=4)


class Service(control_pb2_grpc.DiscoveryServicer, probe_sets_pb2_grpc.ProbeSetsServicer):
    """Pushes what a test puts in, keeps what the engine says, and hands out probe sets as a test wants."""

    def __init__(self) -> None:
        self.pushes: asyncio.Queue[control_pb2.PolicyPush | None] = asyncio.Queue()
        self.answers: asyncio.Queue[control_pb2.PolicyAnswer] = asyncio.Queue()
        self.hellos: list[control_pb2.EngineHello] = []
        self.reports: list[control_pb2.EngineReport] = []
        self.sets: dict[str, MadeSet] = {}
        self.num_downloads = 0
        self.download_errors: list[grpc.StatusCode] = []

    async def Follow(self, messages, context):  # noqa: N802
        reader = asyncio.create_task(self._read(messages))
        try:
            while (push := await self.pushes.get()) is not None:
                yield push
        finally:
            reader.cancel()

    async def _read(self, messages) -> None:
        async for message in messages:
            if message.WhichOneof("kind") == "hello":
                self.hellos.append(message.hello)
            elif message.WhichOneof("kind") == "answer":
                self.answers.put_nowait(message.answer)
            else:
                self.reports.append(message.report)

    async def DownloadProbeSet(self, request, context):  # noqa: N802
        self.num_downloads += 1
        if self.download_errors:
            await context.abort(self.download_errors.pop(), "not now")
        made = self.sets[request.name]
        yield probe_sets_pb2.DownloadProbeSetResponse(
            header=probe_sets_pb2.ProbeSetHeader(
                name=request.name, size_bytes=len(made.weights), sha256=made.sha256, format="sedac-probe-set/1", manifest=made.manifest
            )
        )
        yield probe_sets_pb2.DownloadProbeSetResponse(chunk=made.weights)

    async def push(self, policy: Policy, revision: int, *, rollout: int = 0, candidate: Policy = OTHER, share: float = 0.5, sets=()):
        """Push and return the answer."""
        message = control_pb2.PolicyPush(nonce=f"n{revision}", policy=wire.policy_to_proto(policy, revision=revision))
        if rollout:
            message.candidate.CopyFrom(control_pb2.Candidate(rollout=rollout, policy=wire.policy_to_proto(candidate), share=share))
        for name in sets:
            made = self.sets[name]
            message.probe_sets.add(name=name, sha256=made.sha256, size_bytes=len(made.weights))
        return await self.push_raw(message)

    async def push_raw(self, message: control_pb2.PolicyPush) -> control_pb2.PolicyAnswer:
        """Push a message as it is and return the answer."""
        self.pushes.put_nowait(message)
        async with asyncio.timeout(20):
            return await self.answers.get()


def _fields(answer: control_pb2.PolicyAnswer) -> dict[str, str]:
    """The fields at fault of a NACK."""
    bad = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad) for detail in answer.error.details)
    return {v.field: v.description for v in bad.field_violations}


def _refuse_weights() -> str:
    raise ConfigError("random weights")


@contextlib.asynccontextmanager
async def _following(name: str, layout=ROOMY, *, find_weights=_refuse_weights, **settings) -> AsyncIterator[tuple[Agent, Service]]:
    """An agent with recorded workers that follows a scripted service."""
    service, server = Service(), grpc.aio.server()
    control_pb2_grpc.add_DiscoveryServicer_to_server(service, server)
    probe_sets_pb2_grpc.add_ProbeSetsServicer_to_server(service, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    engine = AttachedEngine(client=Workers(layout))
    layout = replace(await engine.describe(), probe_set_sha256="2" * 64)
    agent = Agent(
        engine=engine,
        settings=EngineSettings(control_address=address, engine_id=name, poll_seconds=0.05, **settings),
        layout=layout,
        metrics=EngineMetrics(model_name=name, layout=layout),
        hello=control_pb2.EngineHello(engine_id=name, max_rank=layout.max_rank),
        find_weights=find_weights,
    )
    await agent.start(FIRST)
    try:
        yield agent, service
    finally:
        await agent.stop()
        await server.stop(0)


async def _until(condition) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  the agent has nothing to wait for
            await asyncio.sleep(0.01)


_NEWER = b"\xa0\x06\x07"
"""field 100, a varint, 7: what a newer contract would add"""


@pytest.mark.parametrize(
    ("find", "path"),
    [
        (lambda push: push.policy, "100"),
        (lambda push: push.policy.speculation, "speculation.100"),
        (lambda push: push.policy.checkpoints[1], "checkpoints[1].100"),
        (lambda push: push.candidate, "candidate.100"),
        (lambda push: push.candidate.policy.audit, "candidate.policy.audit.100"),
    ],
)
def test_a_knob_of_a_newer_contract_is_refused_by_its_number(find, path):
    async def scenario() -> None:
        async with _following("older") as (agent, service):
            await service.push(FIRST, 3)
            push = control_pb2.PolicyPush(nonce="n4", policy=wire.policy_to_proto(FIRST, revision=4))
            push.candidate.CopyFrom(control_pb2.Candidate(rollout=1, policy=wire.policy_to_proto(OTHER), share=0.5))
            find(push).MergeFromString(_NEWER)
            answer = await service.push_raw(push)
            assert (answer.revision, answer.rollout) == (3, 0), "the last good policy stays"
            told = f"is the number of a field that this engine's SEDAC {__version__} does not know; update the engine, or leave that knob out"
            assert _fields(answer) == {path: told}
            assert agent.revision == 3

    asyncio.run(scenario())


def test_what_a_newer_service_says_beside_the_policies_is_ignored():
    async def scenario() -> None:
        async with _following("older-beside") as (_, service):
            push = control_pb2.PolicyPush(nonce="n5", policy=wire.policy_to_proto(FIRST, revision=5), version="99.0.0", capabilities=["dreams"])
            push.MergeFromString(_NEWER)
            answer = await service.push_raw(push)
            assert (answer.revision, answer.HasField("error")) == (5, False)

    asyncio.run(scenario())


def test_a_candidate_comes_stays_grows_and_goes():
    async def scenario() -> None:
        async with _following("sides") as (agent, service):
            answer = await service.push(FIRST, 3, rollout=2)
            assert (answer.revision, answer.rollout, answer.HasField("error")) == (3, 2, False)
            terms = agent.get_terms()
            assert (terms.policy, terms.candidate.rollout, terms.candidate.policy, terms.candidate.share) == (FIRST, 2, OTHER, 0.5)
            assert [candidate["rollout"] for candidate in agent.engine.client.candidates] == [2, 2]
            book = agent.find_book(2)
            assert set(book.pages) == {"exact", "mine"}
            assert describe_agent(agent)["candidate"]["rollout"] == 2
            assert get_metric("sedac_rollout", "sides") == 2
            await service.push(FIRST, 3, rollout=2, share=0.9)
            assert agent.get_terms().candidate.share == 0.9
            assert agent.find_book(2) is book, "the same candidate keeps its evidence"
            await _until(lambda: service.reports and len(service.reports[-1].evidence) == 4)
            assert {(e.revision, e.rollout, e.tier) for e in service.reports[-1].evidence} == {
                (3, 0, "exact"),
                (3, 0, "balanced"),
                (0, 2, "exact"),
                (0, 2, "mine"),
            }
            answer = await service.push(OTHER, 4)
            assert (answer.revision, answer.rollout, agent.get_terms().candidate, agent.find_book(2)) == (4, 0, None, None)
            assert get_metric("sedac_rollout", "sides") == 0

    asyncio.run(scenario())


def test_while_a_candidate_is_on_its_way_no_request_gets_it():
    async def scenario() -> None:
        async with _following("between-sides") as (agent, service):
            await service.push(FIRST, 3, rollout=2)
            workers = agent.engine.client
            for rollout, share, candidate, meanwhile in ((2, 0.9, OTHER, 0.5), (2, 0.9, FIRST, None), (3, 0.9, OTHER, None), (0, 0, OTHER, None)):
                await service.push(FIRST, 3, rollout=2)
                workers.gate.clear()
                pushing = asyncio.create_task(service.push(FIRST, 3, rollout=rollout, share=share, candidate=candidate))
                await _until(lambda meanwhile=meanwhile: (agent._offer.share if agent._offer else None) == meanwhile)
                assert agent.get_terms().policy.enabled, "the policy in force stays as it is"
                workers.gate.set()
                await pushing
                assert (agent.get_terms().candidate.share if rollout else agent.get_terms().candidate) == (share if rollout else None)

    asyncio.run(scenario())


_BAD = replace(FIRST, checkpoints=(Checkpoint(layer=2, threshold=math.nan),))
_ABSENT = replace(FIRST, checkpoints=(Checkpoint(layer=3, threshold=1.0),))


@pytest.mark.parametrize(
    ("policy", "knobs", "field"),
    [
        (_BAD, {}, "checkpoints[0].threshold"),
        (_ABSENT, {}, "checkpoints[0].layer"),
        (replace(FIRST, probe_set="elsewhere"), {}, "probe_set"),
        (certify(FIRST), {}, "certificate.weights_sha256"),
        (FIRST, {"rollout": 2, "candidate": _BAD}, "candidate.policy.checkpoints[0].threshold"),
        (FIRST, {"rollout": 2, "candidate": _ABSENT}, "candidate.policy.checkpoints[0].layer"),
        (FIRST, {"rollout": 2, "candidate": replace(FIRST, probe_set="elsewhere")}, "candidate.policy.probe_set"),
        (FIRST, {"rollout": 2, "share": math.nan}, "candidate.share"),
        (FIRST, {"rollout": 2, "share": 1.5}, "candidate.share"),
        (FIRST, {"rollout": -2}, "candidate.rollout"),
        (replace(FIRST, checkpoints=(Checkpoint(layer=2, threshold=1.0),) * 20_000), {}, "policy"),
    ],
)
def test_a_push_that_can_not_be_is_refused_by_field_and_the_last_good_one_stays(policy, knobs, field):
    async def scenario() -> None:
        async with _following("refusing") as (agent, service):
            await service.push(FIRST, 3, rollout=1)
            answer = await service.push(policy, 4, **knobs)
            assert (answer.revision, answer.rollout, answer.error.code) == (3, 1, 3)
            assert field in _fields(answer)
            assert describe_agent(agent)["state"] == "NACKED"
            assert (agent.policy, agent.candidate.rollout, agent.engine.client.revisions) == (FIRST, 1, [3, 3])
            assert agent.get_terms().policy.enabled
            assert agent.get_terms().candidate.rollout == 1, "what was held back while it was looked at is given again"
            assert not (await service.push(OTHER, 5)).HasField("error")

    asyncio.run(scenario())


def test_workers_that_fail_are_a_refusal_and_the_last_good_policy_is_put_back():
    async def scenario() -> None:
        async with _following("failing") as (agent, service):
            await service.push(FIRST, 3)
            workers, apply = agent.engine.client, Workers._sedac_apply

            def apply_in_one_worker(worker, policy, revision, candidate=None):
                if revision == 4 and worker == 1:
                    raise Exception("Call to collective_rpc method failed")  # as vLLM raises it
                return apply(workers, worker, policy, revision, candidate)

            workers._sedac_apply = apply_in_one_worker
            answer = await service.push(OTHER, 4)
            assert (answer.revision, answer.error.code) == (3, 13)
            assert "collective_rpc method failed" in agent.refusal
            assert (workers.revisions, workers.policies) == ([3, 3], [FIRST, FIRST])
            assert not (await service.push(OTHER, 5)).HasField("error")

    asyncio.run(scenario())


def test_a_named_probe_set_is_fetched_preloaded_and_then_named(tmp_path):
    async def scenario() -> None:
        async with _following("swapping", probe_cache=tmp_path) as (agent, service):
            service.sets = {"fresh": make_set("fresh", levels=False), "newer": make_set("newer", levels=False, seed=1)}
            fresh = service.sets["fresh"]
            workers = agent.engine.client
            answer = await service.push(replace(FIRST, probe_set="fresh"), 3, sets=["fresh"])
            assert not answer.HasField("error"), answer.error
            assert workers.preloads == [(str(tmp_path / fresh.sha256), fresh.sha256)]
            assert workers.policies[0].probe_set == "fresh"
            workers.failing["sedac_preloaded"] = RuntimeError("a set in force needs no looking after")
            answer = await service.push(replace(FIRST, probe_set="fresh"), 4, sets=["fresh"])
            assert not answer.HasField("error"), answer.error
            assert (service.num_downloads, len(workers.preloads)) == (1, 1), "it is there already"
            workers.failing.clear()
            service.download_errors = [grpc.StatusCode.UNAVAILABLE]
            candidate = replace(OTHER, probe_set="newer")
            answer = await service.push(replace(FIRST, probe_set="fresh"), 5, rollout=2, candidate=candidate, sets=["fresh", "newer"])
            assert (answer.rollout, answer.HasField("error")) == (2, False), "one failed try is no reason to refuse"
            assert [digest for _, digest in workers.preloads] == [fresh.sha256, service.sets["newer"].sha256]

    asyncio.run(scenario())


def test_a_probe_set_that_does_not_arrive_fit_or_load_is_refused(tmp_path):
    async def scenario() -> None:
        async with _following("not-swapping", probe_cache=tmp_path) as (agent, service):
            await service.push(FIRST, 3)
            service.sets = {"fresh": make_set("fresh", levels=False), "large": make_set("large", rank=8, levels=False)}
            naming = replace(FIRST, probe_set="fresh")
            service.download_errors = [grpc.StatusCode.NOT_FOUND] * 3
            answer = await service.push(naming, 4, sets=["fresh"])
            assert "not now" in _fields(answer)["probe_set"]
            right, service.sets["fresh"] = service.sets["fresh"], replace(service.sets["fresh"], weights=b"x" * 4000)
            assert "sha256" in _fields(await service.push(naming, 5, sets=["fresh"]))["probe_set"]
            answer = await service.push(FIRST, 6, rollout=1, candidate=replace(OTHER, probe_set="large"), sets=["large"])
            assert "its rank 8 is over 4" in _fields(answer)["candidate.policy.probe_set"]
            service.sets["fresh"] = right
            agent.engine.client.probe_sets[right.sha256] = {"state": "failed", "problem": "no room for it"}
            assert "no room for it" in _fields(await service.push(naming, 7, sets=["fresh"]))["probe_set"]
            assert (agent.revision, agent.policy, agent.engine.client.revisions) == (3, FIRST, [3, 3])

    asyncio.run(scenario())


def test_a_certificate_is_held_against_the_set_that_the_policy_names(tmp_path):
    async def scenario() -> None:
        async with _following("certified-swap", probe_cache=tmp_path, find_weights=lambda: "1" * 64) as (agent, service):
            service.sets = {"fresh": make_set("fresh", levels=False)}
            naming = replace(FIRST, probe_set="fresh")
            foreign = await service.push(certify(naming), 3, sets=["fresh"])
            assert (
                "the engine has" in _fields(foreign)["certificate.probe_set_sha256"] or "certify" in _fields(foreign)["certificate.probe_set_sha256"]
            )
            fitting = await service.push(certify(naming, probe_set=service.sets["fresh"].sha256), 4, sets=["fresh"])
            assert not fitting.HasField("error"), fitting.error
            assert describe_agent(agent)["certified"]

    asyncio.run(scenario())


def test_joining_waits_for_the_services_policy():
    async def scenario() -> None:
        async with _following("joining", join_seconds=30) as (agent, service):
            joining = asyncio.create_task(agent.join())
            await _until(lambda: service.hellos)
            await asyncio.sleep(0.05)
            assert not joining.done()
            await service.push(OTHER, 3)
            await asyncio.wait_for(joining, 10)
            assert agent.get_terms().policy == OTHER

    asyncio.run(scenario())


def test_joining_ends_with_a_refusal_as_well():
    async def scenario() -> None:
        async with _following("joining-refused", join_seconds=30) as (agent, service):
            await service.push(_BAD, 3)
            await asyncio.wait_for(agent.join(), 10)
            assert agent.policy == FIRST

    asyncio.run(scenario())


@pytest.mark.parametrize("join_seconds", [0, 0.2])
def test_a_service_that_says_nothing_is_not_waited_for_longer_than_told(join_seconds, caplog):
    async def scenario() -> None:
        async with _following("alone", join_seconds=join_seconds) as (agent, _):
            await asyncio.wait_for(agent.join(), 10)
            assert describe_agent(agent)["state"] == "STALE"

    asyncio.run(scenario())
    assert ("has not sent a policy in time (SEDAC_JOIN_SECONDS=0.2); serving under the first policy" in caplog.text) == bool(join_seconds)


def test_a_failure_of_our_own_does_not_end_following(monkeypatch, caplog):
    async def scenario() -> None:
        async with _following("stumbling") as (agent, service):
            made = agent._follower.make_hello
            stumbles = iter([True, True])
            agent._follower.make_hello = lambda: 1 / 0 if next(stumbles, False) else made()
            service.pushes.put_nowait(None)
            answer = await service.push(OTHER, 3)
            assert answer.revision == 3

    monkeypatch.setattr(following, "_MIN_BACKOFF_SECONDS", 0.01)
    asyncio.run(scenario())
    assert "ZeroDivisionError" in caplog.text


def test_weights_that_can_not_be_read_are_no_reason_not_to_follow(caplog):
    def fail() -> str:
        raise PermissionError("not yours")

    async def scenario() -> None:
        async with _following("unreadable", find_weights=fail) as (_, service):
            assert (await service.push(OTHER, 3)).revision == 3

    asyncio.run(scenario())
    assert "PermissionError('not yours')" in caplog.text


def test_what_the_engine_has_attached_and_runs_is_said_at_every_connection():
    async def scenario() -> None:
        async with _following("again") as (_, service):
            await service.push(OTHER, 3)
            service.pushes.put_nowait(None)
            await _until(lambda: len(service.hellos) == 2)
            assert [hello.active_revision for hello in service.hellos] == [0, 3]
            assert [hello.max_rank for hello in service.hellos] == [4, 4]

    asyncio.run(scenario())


def test_fetched_sets_lie_where_they_can(tmp_path, monkeypatch):
    assert find_probe_cache(EngineSettings(probe_cache=tmp_path / "mine")) == tmp_path / "mine"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert find_probe_cache(EngineSettings()) == tmp_path / "cache" / "sedac" / "probe-sets"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found = find_probe_cache(EngineSettings())
    assert found.is_dir()
    assert tmp_path not in found.parents or "sedac-probe-sets-" in found.name
