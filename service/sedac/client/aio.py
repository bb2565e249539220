"""The client for asyncio: the methods of `ControlClient`, awaited; what a call is, and what takes several calls, is told once for both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, Unpack

import grpc

from sedac.client import requests, steps
from sedac.client.connection import OPTIONS, Connection
from sedac.client.diff import Change
from sedac.client.probe_files import ProbeSetDownload, ProbeSetUpload, Progress
from sedac.client.requests import Call, Knobs
from sedac.client.steps import Pause, Steps
from sedac.contract.credentials import Credentials
from sedac.contract.v1 import audit_log_pb2, control_pb2, probe_sets_pb2, rollouts_pb2
from sedac.policy.model import Policy

_T = TypeVar("_T")


class AsyncControlClient(Connection):
    """One channel to a control service; made and used on one event loop, as an async context manager.

        async with AsyncControlClient("127.0.0.1:50051") as client:
            async for update in client.watch_status():
                print(update.policy.revision, [engine.state for engine in update.engines])

    Methods, arguments and errors are `ControlClient`'s.
    """

    async def __aenter__(self) -> AsyncControlClient:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel; watches end."""
        await self._channel.close()

    async def get_policy(self, revision: int = 0) -> control_pb2.Policy:
        """As `ControlClient.get_policy`."""
        return await self._call(requests.get_policy(revision))

    async def update_policy(
        self, policy: Policy, *, fields: Sequence[str] = (), etag: str = "", comment: str = "", validate_only: bool = False, request_id: str = ""
    ) -> control_pb2.Policy:
        """As `ControlClient.update_policy`."""
        call = requests.update_policy(policy, fields=fields, etag=etag, comment=comment, validate_only=validate_only, request_id=request_id)
        return await self._call(call)

    def list_revisions(self) -> AsyncIterator[control_pb2.Policy]:
        """As `ControlClient.list_revisions`."""
        return self._iterate(steps.list_revisions())

    async def rollback(self, revision: int, *, comment: str = "", etag: str = "", request_id: str = "") -> control_pb2.Policy:
        """As `ControlClient.rollback`."""
        return await self._call(requests.roll_back(revision, comment=comment, etag=etag, request_id=request_id))

    async def diff_policies(self, before: int | Policy = 0, after: int | Policy = 0) -> tuple[Change, ...]:
        """As `ControlClient.diff_policies`."""
        return await self._run(steps.diff_policies(before, after))

    async def watch_policy(self, from_revision: int = 0) -> AsyncIterator[control_pb2.Policy]:
        """As `ControlClient.watch_policy`."""
        position = steps.Position(from_revision)
        async for policy in self._stream(position.make_call):
            position.move_past(policy)
            yield policy

    async def get_status(self) -> control_pb2.Status:
        """As `ControlClient.get_status`."""
        return await self._call(requests.get_status())

    def watch_status(self, interval_seconds: float = 1.0) -> AsyncIterator[control_pb2.Status]:
        """As `ControlClient.watch_status`."""
        return self._stream(lambda: requests.watch_status(interval_seconds))

    def list_engines(self) -> AsyncIterator[control_pb2.EngineStatus]:
        """As `ControlClient.list_engines`."""
        return self._iterate(steps.list_engines())

    def watch_engines(self) -> AsyncIterator[control_pb2.WatchEnginesResponse]:
        """As `ControlClient.watch_engines`."""
        return self._stream(requests.watch_engines)

    async def wait_until_synced(self, revision: int, timeout_seconds: float, *, rollout: int | None = None) -> control_pb2.Status:
        """As `ControlClient.wait_until_synced`."""
        return await self._run(steps.wait_until_synced(revision, timeout_seconds, rollout))

    async def upload_probe_set(
        self, directory: Path | str, *, progress: Progress | None = None, timeout_seconds: float = 600.0
    ) -> probe_sets_pb2.ProbeSet:
        """As `ControlClient.upload_probe_set`."""
        upload = await asyncio.to_thread(ProbeSetUpload, Path(directory), progress)
        return await self._call(requests.upload_probe_set(upload.make_parts), timeout_seconds)

    def list_probe_sets(self) -> AsyncIterator[probe_sets_pb2.ProbeSet]:
        """As `ControlClient.list_probe_sets`."""
        return self._iterate(steps.list_probe_sets())

    async def get_probe_set(self, name: str) -> probe_sets_pb2.ProbeSet:
        """As `ControlClient.get_probe_set`."""
        return await self._call(requests.get_probe_set(name))

    async def delete_probe_set(self, name: str) -> None:
        """As `ControlClient.delete_probe_set`."""
        await self._call(requests.delete_probe_set(name))

    async def download_probe_set(
        self, name: str, directory: Path | str, *, sha256: str = "", progress: Progress | None = None, timeout_seconds: float = 600.0
    ) -> Path:
        """As `ControlClient.download_probe_set`."""
        with ProbeSetDownload(Path(directory), progress) as download:
            async for part in self._stream(lambda: requests.download_probe_set(name, sha256), timeout_seconds):
                download.take(part)
            return download.finish()

    async def start_rollout(self, candidate: Policy | int, **knobs: Unpack[Knobs]) -> rollouts_pb2.Rollout:
        """As `ControlClient.start_rollout`."""
        return await self._call(requests.start_rollout(candidate, knobs))

    async def get_rollout(self, name: str | int = "") -> rollouts_pb2.Rollout:
        """As `ControlClient.get_rollout`."""
        return await self._call(requests.get_rollout(name))

    def list_rollouts(self) -> AsyncIterator[rollouts_pb2.Rollout]:
        """As `ControlClient.list_rollouts`."""
        return self._iterate(steps.list_rollouts())

    async def promote_rollout(self, name: str | int = "", *, comment: str = "", etag: str = "") -> rollouts_pb2.Rollout:
        """As `ControlClient.promote_rollout`."""
        return await self._call(requests.change_rollout("promote", name, comment=comment, etag=etag))

    async def pause_rollout(self, name: str | int = "", *, comment: str = "", etag: str = "") -> rollouts_pb2.Rollout:
        """As `ControlClient.pause_rollout`."""
        return await self._call(requests.change_rollout("pause", name, comment=comment, etag=etag))

    async def resume_rollout(self, name: str | int = "", *, comment: str = "", etag: str = "") -> rollouts_pb2.Rollout:
        """As `ControlClient.resume_rollout`."""
        return await self._call(requests.change_rollout("resume", name, comment=comment, etag=etag))

    async def abort_rollout(self, name: str | int = "", *, comment: str = "", etag: str = "") -> rollouts_pb2.Rollout:
        """As `ControlClient.abort_rollout`."""
        return await self._call(requests.change_rollout("abort", name, comment=comment, etag=etag))

    def watch_rollout(self, name: str | int = "", interval_seconds: float = 1.0) -> AsyncIterator[rollouts_pb2.Rollout]:
        """As `ControlClient.watch_rollout`."""
        return self._iterate(steps.watch_rollout(name, interval_seconds))

    async def wait_for_rollout(self, name: str | int, timeout_seconds: float, *, interval_seconds: float = 1.0) -> rollouts_pb2.Rollout:
        """As `ControlClient.wait_for_rollout`."""
        return await self._run(steps.wait_for_rollout(name, timeout_seconds, interval_seconds))

    def list_audit_entries(self) -> AsyncIterator[audit_log_pb2.AuditEntry]:
        """As `ControlClient.list_audit_entries`."""
        return self._iterate(steps.list_audit_entries())

    def _open_channel(self, credentials: Credentials) -> Any:
        return credentials.open_aio_channel(self.address, OPTIONS)

    async def _call(self, call: Call[_T], timeout_seconds: float | None = None) -> _T:
        attempts = self._make_attempts(call.is_repeatable, timeout_seconds or self.timeout_seconds)
        method = getattr(self._stubs[call.service], call.method)
        while True:
            try:
                return await method(call.make_request(), timeout=attempts.get_seconds_left(), metadata=self._make_metadata())
            except grpc.RpcError as error:
                pause = attempts.find_pause(error)
                if pause is None:
                    raise self._translate(error) from error
            await asyncio.sleep(pause)

    async def _stream(self, make_call: Callable[[], Call[_T]], timeout_seconds: float | None = None) -> AsyncIterator[_T]:
        attempts = self._make_attempts(make_call().is_repeatable, timeout_seconds)
        while True:
            call = make_call()
            method = getattr(self._stubs[call.service], call.method)
            stream = method(call.make_request(), timeout=attempts.get_seconds_left(), metadata=self._make_metadata())
            try:
                async for answer in stream:
                    attempts.succeed()
                    yield answer
                return
            except grpc.RpcError as error:
                pause = attempts.find_pause(error)
                if pause is None:
                    raise self._translate(error) from error
            finally:
                stream.cancel()
            await asyncio.sleep(pause)

    async def _iterate(self, todo: Steps[_T]) -> AsyncIterator[_T]:
        answer: Any = None
        while True:
            try:
                step = todo.send(answer)
            except StopIteration:
                return
            answer = None
            if isinstance(step, Call):
                answer = await self._call(step)
            elif isinstance(step, Pause):
                await asyncio.sleep(step.seconds)
            else:
                yield step.value

    async def _run(self, todo: Steps[_T]) -> _T:
        return await anext(self._iterate(todo))
