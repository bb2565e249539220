"""The control service's composition root: settings in, a running server out."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from concurrent import futures

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from sedac.contract.credentials import is_loopback
from sedac.contract.v1 import audit_log_pb2_grpc, control_pb2_grpc, probe_sets_pb2_grpc, rollouts_pb2_grpc
from sedac.control.access.audit_log import AuditLogServicer, AuditLogStore
from sedac.control.access.auth import Authenticator
from sedac.control.access.gate import Gate
from sedac.control.access.limits import Limits
from sedac.control.access.tls import ServerCertificate, check_exposure
from sedac.control.base.database import Database
from sedac.control.base.metrics import ControlMetrics, MetricsInterceptor
from sedac.control.base.services import SERVICES
from sedac.control.base.settings import ControlSettings
from sedac.control.fleet.discovery import DiscoveryServicer
from sedac.control.fleet.fleet import Fleet
from sedac.control.policy.servicer import ControlServicer
from sedac.control.probe_sets.servicer import ProbeSetsServicer
from sedac.control.probe_sets.store import ProbeSetStore
from sedac.control.revisions.store import Store
from sedac.control.rollout.changes import Changes
from sedac.control.rollout.driver import RolloutDriver
from sedac.control.rollout.guard import Guard, GuardStore
from sedac.control.rollout.metrics import RolloutMetrics
from sedac.control.rollout.observer import Observer
from sedac.control.rollout.servicer import RolloutServicer
from sedac.control.rollout.store import RolloutStore
from sedac.errors import ConfigError

_log = logging.getLogger(__name__)
_SERVICES = tuple(service.full_name for service in SERVICES)


class ControlServer:
    """A control service: `start`, then `stop`."""

    def __init__(self, settings: ControlSettings) -> None:
        self.settings = settings
        self.port = settings.port
        """The port in use, once the server is started."""
        check_exposure(settings)
        self._metrics = ControlMetrics()
        self._certificate = ServerCertificate.read(settings, self._metrics)
        authenticator = Authenticator(settings.principals, certificates=settings.tls_client_ca is not None, metrics=self._metrics)
        self._gate = Gate(authenticator, Limits(settings, self._metrics), settings, self._metrics)
        self._watch: asyncio.Task[None] | None = None
        self._database = Database(settings.database)
        self._store = Store(self._database, keep_revisions=settings.keep_revisions)
        audit_log = AuditLogStore(self._database)
        self._health = health.aio.HealthServicer()
        self._fleet = fleet = Fleet(self._metrics)
        self._close_metrics: Callable[[], None] = lambda: None
        self._server = grpc.aio.server(
            interceptors=[MetricsInterceptor(self._metrics), self._gate],
            options=[
                ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.keepalive_time_ms", 20_000),  # an engine whose host vanished is STALE after 30 s, not after hours
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.http2.ping_timeout_ms", 10_000),  # without it the timeout above has no effect in grpcio 1.85, which waits 60 s
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # clients may ping every 10 s; half of it allows for jitter
                ("grpc.max_concurrent_streams", settings.max_calls),  # of one connection; the gate refuses sooner, with the remedy
                ("grpc.server_handshake_timeout_ms", round(settings.first_message_seconds * 1000)),
                ("grpc.max_connection_idle_ms", round(settings.max_idle_seconds * 1000)),
                *_make_age_options(settings),
            ],
            migration_thread_pool=futures.ThreadPoolExecutor(max_workers=4),
        )
        metrics, rollouts = RolloutMetrics(self._metrics.registry), RolloutStore(self._database)
        self._changes = changes = Changes(self._database, self._store, rollouts, audit_log, fleet, metrics)
        self._guarded = GuardStore(self._database)
        self._store.keep(lambda: self._guarded.list_needed(self._store))
        self._rollout_driver = RolloutDriver(changes, fleet, metrics)
        self._observer = Observer(fleet, changes, self._guarded, Guard(self._guarded, self._store, changes, fleet, metrics), metrics)
        self._loops: list[asyncio.Task[None]] = []
        control = ControlServicer(self._store, fleet, self._metrics, changes)
        directory = settings.probe_sets or settings.database.parent / "probe-sets"
        self._probe_sets = ProbeSetStore(
            self._database, directory, audit_log, max_bytes=settings.max_probe_set_bytes, max_total_bytes=settings.max_probe_sets_bytes
        )
        self._probe_sets_servicer = ProbeSetsServicer(self._probe_sets, self._store, fleet, settings, changes.lock)
        control_pb2_grpc.add_ControlServicer_to_server(control, self._server)
        probe_sets_pb2_grpc.add_ProbeSetsServicer_to_server(self._probe_sets_servicer, self._server)
        servicer = RolloutServicer(self._store, rollouts, changes, fleet, self._rollout_driver)
        rollouts_pb2_grpc.add_RolloutsServicer_to_server(servicer, self._server)
        control_pb2_grpc.add_DiscoveryServicer_to_server(DiscoveryServicer(self._store, fleet, self._metrics, audit_log), self._server)
        audit_log_pb2_grpc.add_AuditLogServicer_to_server(AuditLogServicer(audit_log), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self) -> None:
        """Listen and report healthy.

        Raises:
            ConfigError: a port is taken or the address can't be used.
        """
        settings = self.settings
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        try:
            self.port = self._listen(f"{host}:{settings.port}")
        except RuntimeError as error:
            raise ConfigError(
                f"{host}:{settings.port} can't be listened on ({error}); another control service may run: change SEDAC_CONTROL_PORT"
            ) from error
        self._changes.restore()
        newest, self._fleet.guard = self._fleet.desired, self._guarded.find_newest()
        if settings.metrics_port:
            self._serve_metrics()
        await self._server.start()
        self._watch = asyncio.create_task(self._gate.watch(self._certificate), name="gate")
        self._loops += [asyncio.create_task(loop.run(), name=type(loop).__name__) for loop in (self._rollout_driver, self._observer)]
        for service in ("", *_SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        _log.info(
            "control service on %s:%d, %s, %s, metrics on %s, database %s, revision %s",
            host,
            self.port,
            "no TLS" if self._certificate is None else "mTLS" if settings.tls_client_ca else "TLS",
            f"principals of {settings.principals}" if settings.principals else "no authentication",
            f"{settings.metrics_host}:{settings.metrics_port}" if settings.metrics_port else "no port",
            settings.database,
            newest.revision if newest else "none yet",
        )
        if not is_loopback(settings.host) and not settings.principals:
            who = "for every certificate of its authority" if settings.tls_client_ca else "without authentication"
            _log.warning("listening on %s %s: let only trusted networks reach it", settings.host, who)

    def _listen(self, address: str) -> int:
        if self._certificate is None:
            return int(self._server.add_insecure_port(address))
        return int(self._server.add_secure_port(address, self._certificate.make_credentials()))

    def _serve_metrics(self) -> None:
        host, port = self.settings.metrics_host, self.settings.metrics_port
        try:
            server, _ = start_http_server(port, host, registry=self._metrics.registry)
        except OSError as error:
            raise ConfigError(f"metrics port {host}:{port} can't be listened on ({error}); change SEDAC_CONTROL_METRICS_PORT") from error

        def close() -> None:
            """Stop the metrics endpoint."""
            server.shutdown()
            server.server_close()

        self._close_metrics = close

    async def stop(self) -> None:
        """Report not serving, end the streams, let running calls finish, close the store; also after a failed start."""
        if self._watch:
            self._watch.cancel()
        await self._health.enter_graceful_shutdown()
        self._fleet.close()
        await self._server.stop(self.settings.drain_seconds)
        await asyncio.to_thread(self._close_metrics)
        await asyncio.gather(*self._loops, return_exceptions=True)  # they end by themselves once the fleet is closed
        await self._probe_sets_servicer.close()
        self._probe_sets.close()
        self._database.close()


def _make_age_options(settings: ControlSettings) -> list[tuple[str, int]]:
    if not settings.max_age_seconds:
        return []
    return [
        ("grpc.max_connection_age_ms", round(settings.max_age_seconds * 1000)),
        ("grpc.max_connection_age_grace_ms", round(settings.drain_seconds * 1000)),
    ]


async def serve(settings: ControlSettings) -> None:
    """Run until SIGTERM or SIGINT."""
    server = ControlServer(settings)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    try:
        await server.start()
        await stopping.wait()
        _log.info("control service stops")
    finally:
        await server.stop()


def run(settings: ControlSettings) -> None:
    """Run the service in the foreground.

    Raises:
        ConfigError: it can't start.
    """
    asyncio.run(serve(settings))
