"""The gRPC service of engines: one stream each, on which the policy in force is pushed and answered.

An engine never has more than one push in flight; the next waits for the answer and is the newest by then. A refusal is shown
and changes nothing: the engine serves on under its last good policy.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc
from google.rpc import code_pb2, status_pb2

from sedac import __version__
from sedac.contract import wire
from sedac.contract.unknown_fields import check_known
from sedac.contract.v1 import control_pb2, control_pb2_grpc
from sedac.control.access.audit_log import AuditLogStore
from sedac.control.access.auth import Caller, check_engine_id, get_caller
from sedac.control.base.metrics import ControlMetrics
from sedac.control.base.status import answering, refuse
from sedac.control.fleet.engine import Engine, Target
from sedac.control.fleet.fleet import Fleet
from sedac.control.revisions.store import Store
from sedac.errors import ControlUnavailable, EngineReplaced, FieldViolation, PolicyInvalid, StaleEtag
from sedac.policy.check import validate
from sedac.policy.model import Policy
from sedac.versions import CAPABILITIES, REFUSE_UNKNOWN_FIELDS

_log = logging.getLogger(__name__)
_MAX_ID_CHARS = 128
_MAX_HELLO_BYTES = 2**16  # it is remembered while the engine is


class DiscoveryServicer(control_pb2_grpc.DiscoveryServicer):
    """What engines follow."""

    def __init__(self, store: Store, fleet: Fleet, metrics: ControlMetrics, audit_log: AuditLogStore) -> None:
        self._store, self._fleet, self._metrics, self._audit_log = store, fleet, metrics, audit_log

    async def Follow(self, messages: AsyncIterator[control_pb2.EngineMessage], context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        """Follow one engine from its hello until its stream ends."""
        async with answering(context):
            hello, initial = await _read_hello(messages)
            check_engine_id(hello.engine_id)
            engine, replaced = self._fleet.join(hello, context.peer())
            if replaced:
                _log.warning("engine %s connected from %s and replaces its connection from %s; two engines need two ids (SEDAC_ENGINE_ID)",
                             engine.id, engine.peer, replaced.peer)  # fmt: skip
            else:
                _log.info("engine %s connected from %s: model %s, %d workers, SEDAC %s",
                          engine.id, engine.peer, hello.model, hello.num_workers, hello.sedac_version or "unknown")  # fmt: skip
            if REFUSE_UNKNOWN_FIELDS not in hello.capabilities:
                _log.warning("engine %s runs SEDAC %s, which drops knobs that it does not know; those added since have no effect there: update it",
                             engine.id, hello.sedac_version or "of an unknown version")  # fmt: skip
            stream = _Stream(engine, self._metrics, self._fleet)
            reader = asyncio.create_task(stream.read(messages), name=f"follow-{engine.id}")
            reader.add_done_callback(stream.end)
            try:
                if initial is not None:
                    await asyncio.shield(asyncio.create_task(self._seed(engine, initial, get_caller(context))))  # stored must mean announced
                await stream.push(context)
            finally:
                reader.cancel()
                self._fleet.leave(engine)
                _log.info("engine %s: the stream from %s ended", engine.id, engine.peer)

    async def _seed(self, engine: Engine, initial: Policy, caller: Caller) -> None:
        if self._fleet.desired is not None:
            return
        try:
            made = await asyncio.to_thread(
                self._store.append_audited,
                self._audit_log,
                initial,
                action="Follow",
                caller=replace(caller, author=f"engine {engine.id}"),
                comment="what the first engine started with",
                first=True,
            )
            _log.info("policy revision %d from engine %s", made.revision, engine.id)
        except StaleEtag:  # another engine was first
            self._fleet.set_desired(await asyncio.to_thread(self._store.find_newest))
        else:
            self._fleet.set_desired(made)


class _Stream:
    """The state of one stream: which push is in flight."""

    def __init__(self, engine: Engine, metrics: ControlMetrics, fleet: Fleet) -> None:
        self._engine, self._metrics, self._fleet = engine, metrics, fleet
        self._nonce = ""
        self._pushed = Target()
        self._ended = False

    def end(self, reader: asyncio.Task[None]) -> None:
        """Note that nothing more will be read."""
        if not reader.cancelled() and reader.exception():
            _log.warning("engine %s: reading its stream failed: %r", self._engine.id, reader.exception())
        self._ended = True
        self._engine.wake.set()

    async def push(self, context: grpc.aio.ServicerContext) -> None:
        """Push the newest policy, whenever nothing is in flight, until the stream ends."""
        engine, fleet = self._engine, self._fleet
        while not self._ended:
            engine.wake.clear()
            if fleet.closing:
                raise ControlUnavailable("the control service is stopping; serve on and connect again")
            if fleet.is_replaced(engine):
                raise EngineReplaced(f"a newer connection of engine {engine.id!r} took over; two engines need two ids (SEDAC_ENGINE_ID)")
            if fleet.desired and not self._nonce and fleet.target != self._pushed:
                self._nonce, self._pushed = secrets.token_hex(8), fleet.target
                candidate = wire.candidate_to_proto(fleet.candidate) if fleet.candidate else None
                references = fleet.probe_sets.find_references(fleet.desired.policy, *([fleet.candidate.policy] if fleet.candidate else []))
                push = control_pb2.PolicyPush(nonce=self._nonce, policy=fleet.desired.to_proto(), candidate=candidate, probe_sets=references)
                push.version = __version__
                push.capabilities.extend(CAPABILITIES)
                await context.write(push)
            else:
                await engine.wake.wait()

    async def read(self, messages: AsyncIterator[control_pb2.EngineMessage]) -> None:
        """Take answers and reports until the engine has no more."""
        async for message in messages:
            self._engine.touch()
            kind = message.WhichOneof("kind")
            if kind == "report":
                self._fleet.take_report(self._engine, message.report)
            elif kind == "answer":
                self._note_answer(message.answer)

    def _note_answer(self, answer: control_pb2.PolicyAnswer) -> None:
        engine, pushed = self._engine, self._pushed
        if not self._nonce or answer.nonce != self._nonce:
            _log.warning("engine %s answered with nonce %r, which is not the one in flight; ignored", engine.id, answer.nonce[:40])
            return
        error = answer.error if answer.HasField("error") else None
        if error is None and (answer.revision, answer.rollout) != (pushed.revision, pushed.rollout):
            wanted, found = _name(pushed.revision, pushed.rollout), _name(answer.revision, answer.rollout)
            message = f"acknowledged revision {wanted} but runs {found}; restart the engine"
            error = status_pb2.Status(code=code_pb2.INTERNAL, message=message)
        self._nonce, engine.error, engine.answered = "", error, pushed
        engine.active_revision, engine.active_rollout = answer.revision, answer.rollout
        self._metrics.answers.labels("nack" if error else "ack").inc()
        if error:
            refused, active = _name(pushed.revision, pushed.rollout), _name(answer.revision, answer.rollout)
            _log.error("engine %s refused revision %s and serves on under %s: %s", engine.id, refused, active, error.message)
        else:
            self._fleet.note_acknowledged(pushed.revision)
        engine.wake.set()
        self._fleet.notify(engine)


def _name(revision: int, rollout: int) -> str:
    return f"{revision} with roll-out {rollout}" if rollout else str(revision)


async def _read_hello(messages: AsyncIterator[control_pb2.EngineMessage]) -> tuple[control_pb2.EngineHello, Policy | None]:
    first = await anext(aiter(messages), None)
    if first is None or first.WhichOneof("kind") != "hello":
        raise refuse("hello", "the first message must be a hello")
    hello = first.hello
    if hello.ByteSize() > _MAX_HELLO_BYTES:
        raise refuse("hello", f"{hello.ByteSize()} bytes; at most {_MAX_HELLO_BYTES}")
    if not 0 < len(hello.engine_id) <= _MAX_ID_CHARS:
        raise refuse("hello.engine_id", f"{len(hello.engine_id)} characters; give 1 to {_MAX_ID_CHARS} (SEDAC_ENGINE_ID)")
    if not hello.HasField("initial_policy"):
        return hello, None
    try:
        check_known(hello.initial_policy, "control service")
    except PolicyInvalid as error:  # it can be followed all the same
        _log.warning("engine %s: what it started with does not become the first policy: %s", hello.engine_id, error)
        return hello, None
    try:
        initial = wire.policy_from_proto(hello.initial_policy)
        validate(initial)
    except PolicyInvalid as error:
        raise PolicyInvalid([FieldViolation(f"hello.initial_policy.{v.field}", v.description) for v in error.violations]) from None
    return hello, initial
