"""What the tests of access share: principals and their tokens in files, and calls of any method by its descriptor."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from sedac.contract.credentials import Metadata, read_credentials
from sedac.contract.v1 import control_pb2
from sedac.control.access.principals import make_token
from sedac.control.base.services import SERVICES

GET, UPDATE, WATCH = (f"/sedac.control.v1.Control/{name}" for name in ("GetStatus", "UpdatePolicy", "WatchStatus"))
FOLLOW, DOWNLOAD = "/sedac.control.v1.Discovery/Follow", "/sedac.control.v1.ProbeSets/DownloadProbeSet"
REFLECT = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
OK, UNAUTHENTICATED, DENIED = grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
UPDATE_MESSAGE = control_pb2.UpdatePolicyRequest(
    policy=control_pb2.Policy(enabled=True, checkpoints=[control_pb2.Checkpoint(layer=2, threshold=0.5)])
).SerializeToString()
ROLES = ("viewer", "operator", "admin", "engine")
METHODS: dict[str, MethodDescriptor] = {f"/{service.full_name}/{method.name}": method for service in SERVICES for method in service.methods}
"""every method of the contract by its path"""


class PrincipalsFile:
    """A principals file and the tokens of those in it, each in a file of its own."""

    def __init__(self, directory: Path) -> None:
        self.path, self._directory = directory / "principals.jsonl", directory
        self._lines: dict[str, str] = {}
        self.tokens: dict[str, str] = {}

    def add(self, name: str, role: str, **more: Any) -> Path:
        """Give somebody a new token, in place of an older one; returns its file."""
        self.tokens[name], self._lines[name] = make_token(name, role, **more)
        self.write()
        file = self.get_token_file(name)
        file.write_text(self.tokens[name] + "\n")
        return file

    def add_line(self, name: str, line: str) -> None:
        """Add a line as it is."""
        self._lines[name] = line
        self.write()

    def remove(self, name: str) -> None:
        """Revoke somebody's token."""
        del self._lines[name]
        self.write()

    def write(self) -> None:
        """Write the file."""
        self.path.write_text("".join(f"{line}\n" for line in self._lines.values()))

    def get_token_file(self, name: str) -> Path:
        """Return the file of somebody's token."""
        return self._directory / f"{name}.token"

    def make_metadata(self, name: str) -> Metadata:
        """Return what somebody sends with a call."""
        return read_credentials(token_file=self.get_token_file(name)).make_call_metadata()


def call(channel: grpc.Channel, path: str, metadata: Metadata = (), *, timeout: float = 20.0, message: bytes = b"") -> grpc.StatusCode:
    """Call a method with one message, take one answer at most and hang up; returns the status, OK where there was an answer."""
    return find_error(channel, path, metadata, timeout=timeout, message=message)[0]


def find_error(
    channel: grpc.Channel, path: str, metadata: Metadata = (), *, timeout: float = 20.0, message: bytes = b""
) -> tuple[grpc.StatusCode, str, str]:
    """Call a method as `call` does; returns status, details and the reason of the ErrorInfo."""
    method = METHODS.get(path)
    many_in, many_out = (method.client_streaming, method.server_streaming) if method else (False, False)
    kind = f"{'stream' if many_in else 'unary'}_{'stream' if many_out else 'unary'}"
    stub = getattr(channel, kind)(path)
    request = iter([message]) if many_in else message
    try:
        answer = stub(request, metadata=metadata, timeout=timeout)
        if many_out:
            next(answer, None)
            answer.cancel()
    except grpc.RpcError as error:
        reasons = []
        for detail in (rpc_status.from_call(error) or type("none", (), {"details": ()})).details:
            info = error_details_pb2.ErrorInfo()
            if detail.Unpack(info):
                reasons.append(info.reason)
        return error.code(), error.details() or "", ",".join(reasons)
    return grpc.StatusCode.OK, "", ""


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    """Wait for something to come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)
