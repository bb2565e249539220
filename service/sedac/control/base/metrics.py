"""The control service's own metrics, on their own port; label sets are closed and pre-created."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from sedac.contract.v1 import control_pb2
from sedac.control.base.services import SERVICES

STATES = {number: name.removeprefix("ENGINE_STATE_").lower() for name, number in control_pb2.EngineState.items() if number}
"""The states of an engine as label values."""
_RPC_LABELS = ["grpc_service", "grpc_method"]


class ControlMetrics:
    """Metrics of one control service, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        make: dict[str, Any] = {"registry": self.registry}
        self.revision = Gauge("sedac_control_policy_revision", "Newest policy revision; 0: none yet.", **make)
        self.engines = Gauge("sedac_control_engines", "Engines by state.", ["state"], **make)
        self.changes = Counter("sedac_control_policy_changes", "Policy changes asked for, by result.", ["result"], **make)
        self.answers = Counter("sedac_control_engine_answers", "Answers of engines to pushed policies, by result.", ["result"], **make)
        self.denied = Counter("sedac_control_denied_calls", "Calls refused for want of proof or of a role.", ["reason"], **make)
        self.limited = Counter("sedac_control_limited_calls", "Calls refused by a limit.", ["limit"], **make)
        self.file_refused = Gauge("sedac_control_file_refused", "1: the file's last change can't be used; what it said before is.", ["file"], **make)
        self.started = Counter("grpc_server_started", "Calls started.", _RPC_LABELS, **make)
        self.handled = Counter("grpc_server_handled", "Calls completed, by code.", [*_RPC_LABELS, "grpc_code"], **make)
        self.seconds = Histogram("grpc_server_handling_seconds", "Time of unary calls.", _RPC_LABELS, **make)
        for state in STATES.values():
            self.engines.labels(state)
        for result in ("accepted", "refused"):
            self.changes.labels(result)
        for result in ("ack", "nack"):
            self.answers.labels(result)
        for reason in ("unauthenticated", "permission_denied"):
            self.denied.labels(reason)
        for limit in ("calls", "streams", "rate", "silence"):
            self.limited.labels(limit)
        for file in ("principals", "certificate"):
            self.file_refused.labels(file)
        for service in SERVICES:
            for method in service.methods:
                self.started.labels(service.full_name, method.name)
                for code in grpc.StatusCode:
                    self.handled.labels(service.full_name, method.name, code.name)
                if not method.server_streaming:
                    self.seconds.labels(service.full_name, method.name)

    def show_fleet(self, revision: int, counts: dict[str, int]) -> None:
        """Show the desired revision and how many engines are in each state."""
        self.revision.set(revision)
        for state, count in counts.items():
            self.engines.labels(state).set(count)

    @contextlib.contextmanager
    def observe(self, service: str, method: str, context: grpc.aio.ServicerContext) -> Iterator[None]:
        """Count one call from its start to its end, with the code it ended with."""
        self.started.labels(service, method).inc()
        code = grpc.StatusCode.UNKNOWN  # what gRPC makes of an exception that nobody turned into a status
        try:
            yield
            code = _find_code(context) or grpc.StatusCode.OK
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        except Exception:
            code = _find_code(context) or code
            raise
        finally:
            self.handled.labels(service, method, code.name).inc()


class MetricsInterceptor(grpc.aio.ServerInterceptor):
    """Counts calls and times unary ones, with the metric names that gRPC dashboards expect."""

    def __init__(self, metrics: ControlMetrics) -> None:
        self._metrics = metrics

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """Wrap the handler of one call; a method that nobody serves is not counted, so that callers can't make labels."""
        handler = await continuation(details)
        if handler is None:
            return None
        _, service, method = details.method.split("/")
        metrics, inner = self._metrics, handler.unary_unary or handler.unary_stream or handler.stream_stream or handler.stream_unary

        async def stream(request: Any, context: grpc.aio.ServicerContext) -> None:
            """Answer one call with a stream, and count it."""
            with metrics.observe(service, method, context):
                if inspect.isasyncgenfunction(inner):
                    async with contextlib.aclosing(inner(request, context)) as responses:
                        async for response in responses:
                            await context.write(response)
                else:
                    await inner(request, context)

        async def unary(request: Any, context: grpc.aio.ServicerContext) -> Any:
            """Answer one call, count it and measure its time."""
            with metrics.observe(service, method, context), metrics.seconds.labels(service, method).time():
                return await inner(request, context)

        if handler.response_streaming:
            make = grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
            return make(stream, handler.request_deserializer, handler.response_serializer)
        make = grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
        return make(unary, handler.request_deserializer, handler.response_serializer)


def _find_code(context: grpc.aio.ServicerContext) -> grpc.StatusCode | None:
    code = context.code()  # None, a StatusCode or its number: grpcio 1.80 to 1.85 keep what was set
    return next((c for c in grpc.StatusCode if code in (c, c.value[0])), None)
