"""What both clients know of the connection: its options, who calls, how long to go on trying, and what an error means."""

from __future__ import annotations

import abc
import getpass
import os
import random
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import grpc
from grpc_status import rpc_status

from sedac.contract import wire
from sedac.contract.credentials import Credentials, Metadata, read_credentials
from sedac.contract.v1 import audit_log_pb2_grpc, control_pb2_grpc, probe_sets_pb2_grpc, rollouts_pb2_grpc
from sedac.errors import ControlUnavailable, LimitExceeded, PermissionDenied, SedacError, Unauthenticated

DEFAULT_ADDRESS = "127.0.0.1:50051"
OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),  # a status tells of every engine and all that was measured there
    ("grpc.keepalive_time_ms", 20_000),  # a watch of a service whose host vanished ends after 30 s
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # without it grpcio 1.85 waits 60 s, whatever the timeout above says
    ("grpc.initial_reconnect_backoff_ms", 100),  # gRPC's own second would outlast the repeats here
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)
_FIRST_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 0.1, 1.0
_STUBS: dict[str, Callable[[Any], Any]] = {
    "Control": control_pb2_grpc.ControlStub,
    "ProbeSets": probe_sets_pb2_grpc.ProbeSetsStub,
    "Rollouts": rollouts_pb2_grpc.RolloutsStub,
    "AuditLog": audit_log_pb2_grpc.AuditLogStub,
}
_KINDS = {
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: LimitExceeded,
}


class Attempts:
    """The attempts of one call: how much time is left, and how long to pause before the next one."""

    def __init__(self, timeout_seconds: float | None, num_retries: int) -> None:
        self._deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        self._allowed, self._made = num_retries, 0

    def get_seconds_left(self) -> float | None:
        """Return the next attempt's timeout; None: it has none."""
        return None if self._deadline is None else max(0.001, self._deadline - time.monotonic())

    def find_pause(self, error: grpc.RpcError) -> float | None:
        """Return the seconds to wait before the next attempt; None: there is none, the error counts. Only UNAVAILABLE is worth another."""
        if error.code() != grpc.StatusCode.UNAVAILABLE or self._made >= self._allowed:
            return None
        pause = min(_FIRST_PAUSE_SECONDS * 2**self._made, _MAX_PAUSE_SECONDS) * random.uniform(0.8, 1.2)  # clients must not come back all at once
        self._made += 1
        left = self.get_seconds_left()
        return None if left is not None and left <= pause else pause

    def succeed(self) -> None:
        """Count from none again: a stream that delivered was not in vain."""
        self._made = 0


class Connection(abc.ABC):
    """One client's address, credentials and habits."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        author: str | None = None,
        timeout_seconds: float = 10.0,
        num_retries: int = 5,
        credentials: Credentials | None = None,
    ) -> None:
        """`author` is kept with every change (None: the user's name); a call takes at most `timeout_seconds`, repeats included.

        Calls that found the service UNAVAILABLE are repeated at most `num_retries` times, after 0.1, 0.2, 0.4 ... 1 s, where a repeat
        can't apply a change twice. `credentials` come from SEDAC_CONTROL_TLS and its kin unless given.

        Raises:
            ConfigError: the credentials can't be read, or a token would travel in the clear.
        """
        self.address = address
        self.timeout_seconds = timeout_seconds
        self._num_retries = num_retries
        self._credentials = credentials or read_credentials()
        self._author = (wire.AUTHOR_METADATA, quote(author or _find_user()))
        self._channel: Any = self._open_channel(self._credentials)
        self._stubs = {name: make(self._channel) for name, make in _STUBS.items()}

    @abc.abstractmethod
    def _open_channel(self, credentials: Credentials) -> Any:
        """Open a channel of the kind that the client calls through."""

    def _make_metadata(self) -> Metadata:
        return (self._author, *self._credentials.make_call_metadata())

    def _make_attempts(self, is_repeatable: bool, timeout_seconds: float | None) -> Attempts:
        return Attempts(timeout_seconds, self._num_retries if is_repeatable else 0)

    def _translate(self, error: grpc.RpcError) -> SedacError:
        code, status = error.code(), rpc_status.from_call(error)
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            reason = status.message if status else code.name
            remedy = "is it running? set --address or SEDAC_CONTROL_ADDRESS"
            if "handshake" in str(error.details()).lower():
                remedy = "its certificate or ours was refused: check SEDAC_CONTROL_CA, _SERVER_NAME, _CLIENT_CERT and _CLIENT_KEY"
            elif self._credentials.is_tls:
                remedy += "; TLS is on here, is it on there?"
            return ControlUnavailable(f"control service at {self.address} does not answer ({reason}); {remedy}")
        kind = _KINDS.get(code, SedacError)
        return (wire.error_from_status(status) if status else None) or kind(f"{code.name}: {error.details()}")


def _find_user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id need not have a name
        return f"uid {os.getuid()}"
