"""The agent's link to the control service: one discovery stream, each push answered with ACK or NACK, reports in between.

The service may be slow, away or broken: whatever it does, following goes on, and serving goes on under the last good policy.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import grpc
from google.rpc import code_pb2, status_pb2

from sedac.agent.pushes import Fetch, Orders, read_push
from sedac.contract import wire
from sedac.contract.credentials import Credentials, read_credentials
from sedac.contract.v1 import control_pb2, control_pb2_grpc
from sedac.errors import ControlUnavailable, PolicyInvalid, SedacError

_log = logging.getLogger(__name__)
_MIN_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS = 0.2, 5.0
_STEADY_SECONDS = 5.0  # a connection that lived this long is tried again at once
_OPTIONS = [
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # without it the timeout above has no effect in grpcio 1.85, which waits 60 s
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.max_receive_message_length", 4 * 2**20),
]
MakeFetch = Callable[[grpc.aio.Channel, Credentials], Fetch]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What is in force after a push."""

    revision: int
    rollout: int


@dataclass(kw_only=True)
class Follower:
    """Follows one control service; everything runs on the event loop."""

    address: str
    make_hello: Callable[[], control_pb2.EngineHello]
    make_report: Callable[[], control_pb2.EngineReport]
    apply: Callable[[Orders, Fetch], Awaitable[None]]
    """Puts a push into force, or raises and leaves everything as it was."""
    find_outcome: Callable[[], Outcome]
    make_fetch: MakeFetch
    report_seconds: float
    on_connected: Callable[[bool], None]
    on_answered: Callable[[bool, float], None]
    """Gets whether a push was applied, and the seconds that it took."""
    connected: bool = False
    refusal: str = ""
    """Why the newest push was refused. Empty once a push is applied."""
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once the service has pushed anything."""
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once a push was applied or refused."""

    async def run(self) -> None:
        """Follow until cancelled."""
        backoff = _MIN_BACKOFF_SECONDS
        while True:
            started = time.monotonic()
            try:
                await self._follow()
                reason = "the service closed the stream"
            except grpc.aio.AioRpcError as error:
                reason = f"{error.code().name}: {error.details()}"
            except SedacError as error:
                reason = str(error)
                _log.warning("following the control service at %s failed: %s", self.address, reason)
            except Exception as error:  # noqa: BLE001  whatever the service sends must not end following
                _log.exception("following the control service at %s failed", self.address)
                reason = repr(error)
            if self.connected:
                outcome = self.find_outcome()
                _log.warning("control service at %s lost (%s); serving on under revision %d", self.address, reason, outcome.revision)
                self._set_connected(False)
            if time.monotonic() - started > _STEADY_SECONDS:
                backoff = _MIN_BACKOFF_SECONDS
            await asyncio.sleep(backoff * random.uniform(0.5, 1.5))
            backoff = min(backoff * 2, _MAX_BACKOFF_SECONDS)

    async def _follow(self) -> None:
        credentials = read_credentials()
        outbox: asyncio.Queue[control_pb2.EngineMessage] = asyncio.Queue()
        outbox.put_nowait(control_pb2.EngineMessage(hello=self.make_hello()))
        async with credentials.open_aio_channel(self.address, _OPTIONS) as channel:
            stub = control_pb2_grpc.DiscoveryStub(channel)
            reporter = asyncio.create_task(self._report(outbox), name="sedac-report")
            try:
                async for push in stub.Follow(_drain(outbox), metadata=credentials.make_call_metadata()):
                    if push is None:  # what gRPC makes of bytes that it can't decode (grpc/_common.py)
                        raise ControlUnavailable("it sent bytes that are no push")
                    self.reached.set()
                    self._set_connected(True)
                    outbox.put_nowait(control_pb2.EngineMessage(answer=await self._answer(push, self.make_fetch(channel, credentials))))
                    self.answered.set()
            finally:
                reporter.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await reporter

    def _set_connected(self, connected: bool) -> None:
        if connected != self.connected:
            self.connected = connected
            self.on_connected(connected)
            if connected:
                _log.info("following control service at %s", self.address)

    async def _report(self, outbox: asyncio.Queue[control_pb2.EngineMessage]) -> None:
        while True:
            await asyncio.sleep(self.report_seconds)
            outbox.put_nowait(control_pb2.EngineMessage(report=self.make_report()))

    async def _answer(self, push: control_pb2.PolicyPush, fetch: Fetch) -> control_pb2.PolicyAnswer:
        started, error = time.monotonic(), None
        try:
            await self.apply(read_push(push), fetch)
        except PolicyInvalid as refused:
            error = self._refuse(refused, code_pb2.INVALID_ARGUMENT)
        except Exception as failed:  # noqa: BLE001  of whatever kind a worker's failure arrives as
            _log.exception("policy revision %d could not be applied", push.policy.revision)
            error = self._refuse(failed, code_pb2.INTERNAL)
        else:
            self.refusal = ""
        seconds, outcome = time.monotonic() - started, self.find_outcome()
        if error is None:
            _log.info("policy revision %d in force%s", outcome.revision, f", roll-out {outcome.rollout} beside it" if outcome.rollout else "")
        else:
            _log.error("policy revision %d refused, revision %d stays in force: %s", push.policy.revision, outcome.revision, self.refusal)
        self.on_answered(error is None, seconds)
        return control_pb2.PolicyAnswer(nonce=push.nonce, revision=outcome.revision, rollout=outcome.rollout, error=error, apply_seconds=seconds)

    def _refuse(self, error: Exception, code: int) -> status_pb2.Status:
        self.refusal = (str(error) or type(error).__name__)[:2000]
        return wire.error_to_status(error, code)


async def _drain(outbox: asyncio.Queue[control_pb2.EngineMessage]) -> AsyncIterator[control_pb2.EngineMessage]:
    while True:
        yield await outbox.get()
