"""A typed client of the control service, for scripts and for `sedac ctl`."""

from __future__ import annotations

import getpass
import os
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote

import grpc
from google.protobuf import field_mask_pb2
from grpc_status import rpc_status

from sedac import wire
from sedac.control.v1 import control_pb2, control_pb2_grpc
from sedac.errors import ControlUnavailable, NotSynced, SedacError
from sedac.policy import Policy

DEFAULT_ADDRESS = "127.0.0.1:50051"
_T = TypeVar("_T")


class ControlClient:
    """One channel to a control service; use it as a context manager.

    Every call raises sedac.errors: PolicyInvalid with the fields at fault, StaleEtag, RevisionNotFound, RequestIdReused,
    ControlUnavailable; SedacError itself for what has no class of its own.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, *, author: str | None = None, timeout_seconds: float = 10.0) -> None:
        self.address = address
        self._timeout = timeout_seconds
        self._metadata = ((wire.AUTHOR_METADATA, quote(author or _find_user())),)
        self._channel = grpc.insecure_channel(address)
        self._stub = control_pb2_grpc.ControlStub(self._channel)

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._channel.close()

    def get_policy(self, revision: int = 0) -> control_pb2.Policy:
        """Return the policy in force, or one revision of it."""
        return self._call(self._stub.GetPolicy, control_pb2.GetPolicyRequest(revision=revision))

    def update_policy(
        self, policy: Policy, *, fields: Sequence[str] = (), etag: str = "", comment: str = "", validate_only: bool = False, request_id: str = ""
    ) -> control_pb2.Policy:
        """Change the policy; `fields` names what to take from `policy` (empty: all), `etag` guards against other writers."""
        request = control_pb2.UpdatePolicyRequest(
            policy=wire.policy_to_proto(policy, etag=etag, comment=comment),
            update_mask=field_mask_pb2.FieldMask(paths=fields),
            validate_only=validate_only,
            request_id=request_id,
        )
        return self._call(self._stub.UpdatePolicy, request)

    def list_revisions(self) -> Iterator[control_pb2.Policy]:
        """Yield all revisions, newest first."""
        token = ""
        while True:
            page = self._call(self._stub.ListPolicyRevisions, control_pb2.ListPolicyRevisionsRequest(page_token=token))
            yield from page.policies
            token = page.next_page_token
            if not token:
                return

    def rollback(self, revision: int, *, comment: str = "", etag: str = "", request_id: str = "") -> control_pb2.Policy:
        """Make the content of `revision` the newest revision."""
        request = control_pb2.RollbackPolicyRequest(revision=revision, comment=comment, etag=etag, request_id=request_id)
        return self._call(self._stub.RollbackPolicy, request)

    def get_status(self) -> control_pb2.Status:
        """Return the desired policy and every engine's state."""
        return self._call(self._stub.GetStatus, control_pb2.GetStatusRequest())

    def watch_status(self, interval_seconds: float = 1.0) -> Iterator[control_pb2.Status]:
        """Yield the status now, on every change and at least once per interval, until the caller stops."""
        stream = self._stub.WatchStatus(control_pb2.WatchStatusRequest(interval_seconds=interval_seconds), metadata=self._metadata)
        try:
            yield from stream
        except grpc.RpcError as error:
            raise self._translate(error) from error
        finally:
            stream.cancel()

    def wait_until_synced(self, revision: int, timeout_seconds: float) -> control_pb2.Status:
        """Return once every connected engine runs `revision` or a newer one.

        Raises:
            NotSynced: an engine refused it, none is connected, or the time is up.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            status = self.get_status()
            live = [e for e in status.engines if e.state != control_pb2.ENGINE_STATE_STALE]
            for engine in live:
                if engine.state == control_pb2.ENGINE_STATE_NACKED and engine.desired_revision >= revision:
                    refused = engine.desired_revision
                    raise NotSynced(f"engine {engine.engine.engine_id} refused revision {refused}: {engine.error.message}")
            late = [e.engine.engine_id for e in live if e.state != control_pb2.ENGINE_STATE_SYNCED or e.desired_revision < revision]
            if live and not late:
                return status
            if time.monotonic() >= deadline:
                missing = f"waiting for {', '.join(late)}" if late else "no engine is connected"
                raise NotSynced(f"revision {revision} is not in force everywhere after {timeout_seconds:g} s: {missing}")
            time.sleep(min(0.05, timeout_seconds))

    def _call(self, method: Callable[..., _T], request: Any) -> _T:
        try:
            return method(request, timeout=self._timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._translate(error) from error

    def _translate(self, error: grpc.RpcError) -> SedacError:
        code, status = error.code(), rpc_status.from_call(error)
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            reason = status.message if status else code.name
            return ControlUnavailable(
                f"control service at {self.address} does not answer ({reason}); is it running? set --address or SEDAC_CONTROL_ADDRESS"
            )
        return (wire.error_from_status(status) if status else None) or SedacError(f"{code.name}: {error.details()}")


def _find_user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id need not have a name
        return f"uid {os.getuid()}"
