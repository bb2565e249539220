"""The gate: the interceptor through which every call comes in. Limits, then who calls, then what they may do, then the message.

No message is read before its caller is known to be allowed, and the first one must come soon: a caller that opens streams and sends
nothing holds none for long. Calls that still run when their token or certificate is taken away are ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from sedac.control.access.auth import Authenticator, Principal, set_principal
from sedac.control.access.limits import Limits, TokenBucket
from sedac.control.access.tls import ServerCertificate
from sedac.control.base.metrics import ControlMetrics
from sedac.control.base.settings import ControlSettings
from sedac.control.base.status import answering, refuse
from sedac.errors import LimitExceeded, PermissionDenied, SedacError, Unauthenticated

_log = logging.getLogger(__name__)
_HEALTH_CHECK = "/grpc.health.v1.Health/Check"
_WATCH_SECONDS = 1.0
_LOG_LINES_PER_SECOND, _LOG_BURST = 1.0, 20.0


class Gate(grpc.aio.ServerInterceptor):
    """Lets calls in or refuses them; see the module's docstring."""

    def __init__(self, authenticator: Authenticator, limits: Limits, settings: ControlSettings, metrics: ControlMetrics) -> None:
        self._authenticator, self._limits, self._settings, self._metrics = authenticator, limits, settings, metrics
        self._running: dict[asyncio.Timeout, Principal] = {}
        self._lines = TokenBucket(_LOG_LINES_PER_SECOND, _LOG_BURST)
        self._num_silent = 0

    async def watch(self, certificate: ServerCertificate | None) -> None:
        """Look once a second for files that changed, so that what was revoked ends and what is broken is told of."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            for check in (self.recheck, certificate.refresh) if certificate else (self.recheck,):
                try:
                    check()
                except Exception:  # noqa: BLE001  one failure must not keep the next revocation from counting
                    _log.exception("looking for changed files failed; looking again in %g s", _WATCH_SECONDS)

    def recheck(self) -> None:
        """End the running calls whose token or certificate was taken away or has expired."""
        self._authenticator.refresh()
        for scope, principal in list(self._running.items()):
            if not self._authenticator.is_valid(principal):
                del self._running[scope]
                scope.reschedule(asyncio.get_running_loop().time())

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """Put the gate before the handler of one call; a method that nobody serves stays UNIMPLEMENTED."""
        handler = await continuation(details)
        if handler is None:
            return None
        inner = handler.unary_unary or handler.unary_stream or handler.stream_stream or handler.stream_unary
        method = details.method
        is_stream = handler.request_streaming or handler.response_streaming

        async def run(raw: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> Any:
            """Let one call in, read its first message, and answer it."""
            async with answering(context), self._let_in(method, is_stream, context):
                messages, parse = aiter(raw), functools.partial(_parse, deserialize=handler.request_deserializer)
                first = await self._read_first(messages)
                request = _go_on(first, messages, parse) if handler.request_streaming else parse(first)
                if not inspect.isasyncgenfunction(inner):
                    return await inner(request, context)
                async with contextlib.aclosing(inner(request, context)) as responses:
                    async for response in responses:
                        await context.write(response)
            return None

        make = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
        return make(run, None, handler.response_serializer)

    @contextlib.asynccontextmanager
    async def _let_in(self, method: str, is_stream: bool, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        try:
            with contextlib.ExitStack() as held:
                if method != _HEALTH_CHECK:
                    held.enter_context(self._limits.hold_call())
                principal = self._authenticator.admit(method, context.invocation_metadata() or (), context.auth_context() or {})
                caller = str(principal or _find_host(context))
                if method != _HEALTH_CHECK:
                    self._limits.take(caller)
                if is_stream:
                    held.enter_context(self._limits.hold_stream(caller))
                kept = held.pop_all()
        except SedacError as error:
            self._note(error, method, context)
            raise
        with kept:
            set_principal(principal)
            async with self._end_when_revoked(principal):
                yield

    @contextlib.asynccontextmanager
    async def _end_when_revoked(self, principal: Principal | None) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(None) as scope:
                if principal:
                    self._running[scope] = principal
                try:
                    yield
                finally:
                    self._running.pop(scope, None)
        except TimeoutError:
            if not scope.expired():
                raise
            raise Unauthenticated("the token or certificate of this call was changed, revoked or has expired; call again with a good one") from None

    async def _read_first(self, messages: AsyncIterator[bytes]) -> bytes | None:
        seconds = self._settings.first_message_seconds
        try:
            async with asyncio.timeout(seconds):
                return await anext(messages, None)
        except TimeoutError:
            self._metrics.limited.labels("silence").inc()
            raise LimitExceeded(f"no message came within {seconds:g} s (SEDAC_CONTROL_FIRST_MESSAGE_SECONDS); call again and send it") from None

    def _note(self, error: SedacError, method: str, context: grpc.aio.ServicerContext) -> None:
        """Count and log a refused call; a flood of them is logged now and then."""
        if isinstance(error, Unauthenticated | PermissionDenied):
            self._metrics.denied.labels("unauthenticated" if isinstance(error, Unauthenticated) else "permission_denied").inc()
        if not self._lines.take():
            self._num_silent += 1
            return
        more = f" ({self._num_silent} refused calls before it are not in the log)" if self._num_silent else ""
        self._num_silent = 0
        _log.warning("refused %s from %s: %s%s", method[:120], context.peer(), error, more)


async def _go_on(first: bytes | None, rest: AsyncIterator[bytes], parse: Callable[[bytes], Any]) -> AsyncIterator[Any]:
    if first is None:
        return
    yield parse(first)
    async for message in rest:
        yield parse(message)


def _parse(message: bytes | None, deserialize: Callable[[bytes], Any]) -> Any:
    if message is None:
        raise refuse("message", "is missing; send one")
    try:
        return deserialize(message)
    except (DecodeError, ValueError):
        raise refuse("message", f"{len(message)} bytes that are no message of this method; send what the contract says") from None


def _find_host(context: grpc.aio.ServicerContext) -> str:
    """Return the address of the peer without its port."""
    peer = str(context.peer())
    return peer.rpartition(":")[0] if peer.startswith(("ipv4:", "ipv6:")) else peer
