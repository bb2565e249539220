"""The control service's own metrics, on their own port; label sets are closed and pre-created."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from sedac.control.fleet import STATES

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
        self.started = Counter("grpc_server_started", "Calls started.", _RPC_LABELS, **make)
        self.handled = Counter("grpc_server_handled", "Calls completed, by code.", [*_RPC_LABELS, "grpc_code"], **make)
        self.seconds = Histogram("grpc_server_handling_seconds", "Time of unary calls.", _RPC_LABELS, **make)
        for state in STATES.values():
            self.engines.labels(state)
        for result in ("accepted", "refused"):
            self.changes.labels(result)
        for result in ("ack", "nack"):
            self.answers.labels(result)

    def set_engines(self, counts: dict[str, int]) -> None:
        """Show how many engines are in each state."""
        for state, count in counts.items():
            self.engines.labels(state).set(count)


class MetricsInterceptor(grpc.aio.ServerInterceptor):
    """Counts calls and times unary ones, with the metric names that gRPC dashboards expect."""

    def __init__(self, metrics: ControlMetrics) -> None:
        self._metrics = metrics

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """Wrap the handler of one call."""
        handler = await continuation(details)
        if handler is None:
            return None
        _, service, method = details.method.split("/")
        metrics, inner = self._metrics, handler.unary_unary or handler.unary_stream or handler.stream_stream or handler.stream_unary
        if handler.response_streaming:

            async def stream(request: Any, context: grpc.aio.ServicerContext) -> Any:
                metrics.started.labels(service, method).inc()
                try:
                    async for response in inner(request, context):
                        yield response
                finally:
                    metrics.handled.labels(service, method, _code_name(context)).inc()

            make = grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
            return make(stream, handler.request_deserializer, handler.response_serializer)

        async def unary(request: Any, context: grpc.aio.ServicerContext) -> Any:
            metrics.started.labels(service, method).inc()
            started = time.monotonic()
            try:
                return await inner(request, context)
            finally:
                metrics.handled.labels(service, method, _code_name(context)).inc()
                metrics.seconds.labels(service, method).observe(time.monotonic() - started)

        make = grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
        return make(unary, handler.request_deserializer, handler.response_serializer)


def _code_name(context: grpc.aio.ServicerContext) -> str:
    code = context.code()
    if isinstance(code, grpc.StatusCode):
        return str(code.name)
    return next((c.name for c in grpc.StatusCode if c.value[0] == code), "OK")
