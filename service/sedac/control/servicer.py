"""The two gRPC services: Control for operators, Discovery for engines.

The only place that knows gRPC codes (through status.py), the store and the fleet together. Changes go through one lock, so
that pushes leave in the order of the revisions.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TypeVar

import grpc

from sedac import wire
from sedac.control.fleet import Engine, Fleet
from sedac.control.metrics import ControlMetrics
from sedac.control.status import answering, refuse
from sedac.control.store import Revision, Store
from sedac.control.v1 import control_pb2, control_pb2_grpc
from sedac.errors import RevisionNotFound, SedacError
from sedac.policy import Policy, validate

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
POLICY_NAME = "policies/default"
_FIELDS = ("enabled", "probe_set", "checkpoints", "phase", "scope")
_MAX_COMMENT_CHARS = 1024
_DEFAULT_PAGE, _MAX_PAGE = 50, 1000


def to_proto(revision: Revision) -> control_pb2.Policy:
    """Write a stored revision."""
    return wire.policy_to_proto(
        revision.policy,
        name=POLICY_NAME,
        etag=revision.etag,
        revision=revision.revision,
        create_time=revision.created,
        author=revision.author,
        comment=revision.comment,
    )


class ControlServicer(control_pb2_grpc.ControlServicer):
    """What operators call."""

    def __init__(self, store: Store, fleet: Fleet, metrics: ControlMetrics) -> None:
        self._store, self._fleet, self._metrics = store, fleet, metrics
        self._lock = asyncio.Lock()

    async def GetPolicy(self, request: control_pb2.GetPolicyRequest, context: grpc.aio.ServicerContext) -> control_pb2.Policy:  # noqa: N802
        """Return the revision asked for, or the one in force."""
        async with answering(context):
            _check_name(request.name)
            return to_proto(await _run(lambda: self._store.get(request.revision)) if request.revision else await self._get_newest())
        raise AssertionError("unreachable: answering() ends the call")

    async def UpdatePolicy(self, request: control_pb2.UpdatePolicyRequest, context: grpc.aio.ServicerContext) -> control_pb2.Policy:  # noqa: N802
        """Validate, store and push a change; see the contract."""
        async with answering(context), self._counted(request.validate_only):
            _check_name(request.policy.name)
            _check_comment(request.policy.comment)
            async with self._lock:
                newest = await _run(self._store.find_newest)
                policy = _merge(newest.policy if newest else Policy(), request)
                self._validate(policy)
                if request.validate_only:
                    return wire.policy_to_proto(
                        policy, name=POLICY_NAME, etag=newest.etag if newest else "", revision=newest.revision if newest else 0
                    )
                return await self._append(policy, context, request.policy.comment, request.policy.etag, request.request_id)
        raise AssertionError("unreachable: answering() ends the call")

    async def RollbackPolicy(self, request: control_pb2.RollbackPolicyRequest, context: grpc.aio.ServicerContext) -> control_pb2.Policy:  # noqa: N802
        """Store the content of an older revision as the newest one."""
        async with answering(context), self._counted(False):
            _check_name(request.name)
            _check_comment(request.comment)
            async with self._lock:
                old = await _run(lambda: self._store.get(request.revision))
                self._validate(old.policy)
                comment = request.comment or f"rollback to revision {request.revision}"
                return await self._append(old.policy, context, comment, request.etag, request.request_id)
        raise AssertionError("unreachable: answering() ends the call")

    async def ListPolicyRevisions(  # noqa: N802
        self, request: control_pb2.ListPolicyRevisionsRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.ListPolicyRevisionsResponse:
        """Return one page, newest first; the token is the last revision of the page before."""
        async with answering(context):
            _check_name(request.name)
            if not 0 <= request.page_size <= _MAX_PAGE:
                raise refuse("page_size", f"{request.page_size} is outside 0..{_MAX_PAGE}")
            if request.page_token and not request.page_token.isdigit():
                raise refuse("page_token", f"{request.page_token!r} was not made by this service; start again without one")
            limit = request.page_size or _DEFAULT_PAGE
            before = int(request.page_token) if request.page_token else None
            page = await _run(lambda: self._store.list(before=before, limit=limit + 1))
            token = str(page[limit - 1].revision) if len(page) > limit else ""
            return control_pb2.ListPolicyRevisionsResponse(policies=[to_proto(r) for r in page[:limit]], next_page_token=token)
        raise AssertionError("unreachable: answering() ends the call")

    async def GetStatus(self, request: control_pb2.GetStatusRequest, context: grpc.aio.ServicerContext) -> control_pb2.Status:  # noqa: N802
        """Return the desired policy and every engine's state."""
        return await self._make_status()

    async def WatchStatus(  # noqa: N802
        self, request: control_pb2.WatchStatusRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[control_pb2.Status]:
        """Send the status now, on every change, and at least once per interval."""
        async with answering(context):
            interval = request.interval_seconds or 1.0
            if not 0.1 <= interval <= 60:
                raise refuse("interval_seconds", f"{interval} is outside 0.1..60")
            seen = -1
            while True:
                seen = await self._fleet.wait(seen, interval)
                yield await self._make_status()
                await asyncio.sleep(0.05)  # many engines report at once: one message tells all of it

    async def _get_newest(self) -> Revision:
        newest = await _run(self._store.find_newest)
        if newest is None:
            raise RevisionNotFound("no policy yet: no engine has connected; start one, or set the first policy with UpdatePolicy")
        return newest

    async def _make_status(self) -> control_pb2.Status:
        newest = await _run(self._store.find_newest)
        desired = newest.revision if newest else 0
        engines = [engine.to_status(desired) for _, engine in sorted(self._fleet.engines.items())]
        return control_pb2.Status(policy=to_proto(newest) if newest else None, engines=engines)

    def _validate(self, policy: Policy) -> None:
        validate(policy)
        for engine in self._fleet.connected():
            validate(policy, engine.layout)

    async def _append(self, policy: Policy, context: grpc.aio.ServicerContext, comment: str, etag: str, request_id: str) -> control_pb2.Policy:
        author = _find_author(context)
        made = await _run(lambda: self._store.append(policy, author=author, comment=comment, expected_etag=etag, request_id=request_id))
        _log.info("policy revision %d by %s%s", made.revision, made.author, f": {made.comment}" if made.comment else "")
        self._metrics.revision.set(made.revision)
        self._fleet.notify()
        return to_proto(made)

    @contextlib.asynccontextmanager
    async def _counted(self, validate_only: bool) -> AsyncIterator[None]:
        try:
            yield
        except SedacError:
            self._metrics.changes.labels("refused").inc()
            raise
        if not validate_only:
            self._metrics.changes.labels("accepted").inc()


class DiscoveryServicer(control_pb2_grpc.DiscoveryServicer):
    """What engines follow."""

    def __init__(self, store: Store, fleet: Fleet, metrics: ControlMetrics) -> None:
        self._store, self._fleet, self._metrics = store, fleet, metrics

    async def Follow(  # noqa: N802
        self, messages: AsyncIterator[control_pb2.EngineMessage], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[control_pb2.PolicyPush]:
        """Push the newest policy, one at a time: the next only after the answer, and always the newest by then."""
        async with answering(context):
            first = await anext(aiter(messages), None)
            if first is None or first.WhichOneof("kind") != "hello" or not first.hello.engine_id:
                raise refuse("hello", "the first message must be a hello with an engine_id")
            engine = self._fleet.join(first.hello)
            await self._seed(first.hello)
            answers: asyncio.Queue[control_pb2.PolicyAnswer] = asyncio.Queue()
            reader = asyncio.create_task(self._read(messages, engine, answers), name=f"follow-{first.hello.engine_id}")
            try:
                async for push in self._push(engine, answers, reader):
                    yield push
            finally:
                reader.cancel()
                self._fleet.leave(engine)
                self._metrics.set_engines(self._fleet.count_states())

    async def _seed(self, hello: control_pb2.EngineHello) -> None:
        if not hello.HasField("initial_policy") or await _run(self._store.find_newest) is not None:
            return
        policy = wire.policy_from_proto(hello.initial_policy)
        validate(policy)
        made = await _run(lambda: self._store.append(policy, author=f"engine {hello.engine_id}", comment="what the first engine started with"))
        _log.info("policy revision %d from engine %s", made.revision, hello.engine_id)
        self._metrics.revision.set(made.revision)
        self._fleet.notify()

    async def _push(
        self, engine: Engine, answers: asyncio.Queue[control_pb2.PolicyAnswer], reader: asyncio.Task[None]
    ) -> AsyncIterator[control_pb2.PolicyPush]:
        pushed, seen = 0, -1
        while not reader.done() and self._fleet.engines.get(engine.hello.engine_id) is engine:
            newest = await _run(self._store.find_newest)
            if newest is None or newest.revision == pushed:
                seen = await self._fleet.wait(seen, 1.0)
                continue
            pushed, nonce = newest.revision, secrets.token_hex(8)
            engine.state = control_pb2.ENGINE_STATE_PENDING
            yield control_pb2.PolicyPush(nonce=nonce, policy=to_proto(newest))
            while True:
                answer = await _first_of(answers.get(), reader)
                if answer is None:
                    return
                if answer.nonce == nonce:
                    break
            self._note_answer(engine, answer, newest.revision)

    def _note_answer(self, engine: Engine, answer: control_pb2.PolicyAnswer, revision: int) -> None:
        refused = answer.HasField("error")
        engine.active_revision = answer.revision
        engine.error = answer.error if refused else None
        engine.state = control_pb2.ENGINE_STATE_NACKED if refused else control_pb2.ENGINE_STATE_SYNCED
        self._metrics.answers.labels("nack" if refused else "ack").inc()
        if refused:
            _log.error("engine %s refused revision %d: %s", engine.hello.engine_id, revision, answer.error.message)
        self._fleet.touch(engine)
        self._metrics.set_engines(self._fleet.count_states())

    async def _read(
        self, messages: AsyncIterator[control_pb2.EngineMessage], engine: Engine, answers: asyncio.Queue[control_pb2.PolicyAnswer]
    ) -> None:
        async for message in messages:
            if message.WhichOneof("kind") == "answer":
                answers.put_nowait(message.answer)
            elif message.WhichOneof("kind") == "report":
                engine.report = message.report
                self._fleet.touch(engine)


async def _first_of(getting: Coroutine[None, None, _T], reader: asyncio.Task[None]) -> _T | None:
    """Wait for an item, or for the end of the stream (None)."""
    item = asyncio.ensure_future(getting)
    try:
        await asyncio.wait({item, reader}, return_when=asyncio.FIRST_COMPLETED)
        return item.result() if item.done() else None
    finally:
        item.cancel()


async def _run(call: Callable[[], _T]) -> _T:
    """Run a store call in a thread: an fsync must not hold up the event loop."""
    return await asyncio.to_thread(call)


def _merge(current: Policy, request: control_pb2.UpdatePolicyRequest) -> Policy:
    paths = list(request.update_mask.paths)
    sent = wire.policy_from_proto(request.policy)
    if not paths or paths == ["*"]:
        return sent
    unknown = [path for path in paths if path not in (*_FIELDS, "comment")]
    if unknown:
        raise refuse("update_mask", f"{unknown[0]!r} can't be set; fields: {', '.join(_FIELDS)}, comment")
    return dataclasses.replace(current, **{path: getattr(sent, path) for path in paths if path != "comment"})


def _check_name(name: str) -> None:
    if name not in ("", POLICY_NAME):
        raise RevisionNotFound(f"policy {name!r} does not exist; there is {POLICY_NAME!r}")


def _check_comment(comment: str) -> None:
    if len(comment) > _MAX_COMMENT_CHARS:
        raise refuse("comment", f"{len(comment)} characters; at most {_MAX_COMMENT_CHARS}")


def _find_author(context: grpc.aio.ServicerContext) -> str:
    metadata = dict(context.invocation_metadata() or ())
    return str(metadata.get("sedac-author") or context.peer())[:128]
