"""A typed client of the control service, for scripts and for `sedac ctl`; aio.py has the same for asyncio."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, Unpack

import grpc

from sedac.client import requests, steps
from sedac.client.connection import DEFAULT_ADDRESS as DEFAULT_ADDRESS
from sedac.client.connection import OPTIONS, Connection
from sedac.client.diff import Change
from sedac.client.probe_files import ProbeSetDownload, ProbeSetUpload, Progress
from sedac.client.requests import Call, Knobs
from sedac.client.steps import Pause, Steps
from sedac.contract.credentials import Credentials
from sedac.contract.v1 import audit_log_pb2, control_pb2, probe_sets_pb2, rollouts_pb2
from sedac.policy.model import Policy

_T = TypeVar("_T")


class ControlClient(Connection):
    """One channel to a control service; use it as a context manager.

        with ControlClient("127.0.0.1:50051") as client:
            policy = wire.policy_from_proto(client.get_policy())
            made = client.update_policy(dataclasses.replace(policy, enabled=False), fields=["enabled"], comment="night")
            client.wait_until_synced(made.revision, 5)

    Every call raises what the service refused with, as sedac.errors has it (PolicyInvalid with the fields at fault, StaleEtag,
    RevisionNotFound, PermissionDenied, ...), ControlUnavailable where nobody answers in time, SedacError itself for what has no class of
    its own. Calls that found the service UNAVAILABLE are sent again with the same request_id; see `Connection`.
    """

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel; watches end."""
        self._channel.close()

    def get_policy(self, revision: int = 0) -> control_pb2.Policy:
        """Return the policy in force, or one revision of it; `sedac.contract.wire.policy_from_proto` makes it plain Python."""
        return self._call(requests.get_policy(revision))

    def update_policy(
        self, policy: Policy, *, fields: Sequence[str] = (), etag: str = "", comment: str = "", validate_only: bool = False, request_id: str = ""
    ) -> control_pb2.Policy:
        """Change the policy; `fields` names what to take from `policy` (empty: all), `etag` guards against other writers.

        client.update_policy(Policy(default_tier="exact"), fields=["default_tier"], etag=read.etag, comment="opt-in from now on")
        """
        call = requests.update_policy(policy, fields=fields, etag=etag, comment=comment, validate_only=validate_only, request_id=request_id)
        return self._call(call)

    def list_revisions(self) -> Iterator[control_pb2.Policy]:
        """Yield all revisions, newest first; pages are read as they are needed."""
        return self._iterate(steps.list_revisions())

    def rollback(self, revision: int, *, comment: str = "", etag: str = "", request_id: str = "") -> control_pb2.Policy:
        """Make the content of `revision` the newest revision."""
        return self._call(requests.roll_back(revision, comment=comment, etag=etag, request_id=request_id))

    def diff_policies(self, before: int | Policy = 0, after: int | Policy = 0) -> tuple[Change, ...]:
        """Return the knobs that differ between two policies; numbers are revisions, 0 is the one in force.

        for change in client.diff_policies(3): print(change)      # checkpoints[5].threshold: 0.4 -> 0.6
        """
        return self._run(steps.diff_policies(before, after))

    def watch_policy(self, from_revision: int = 0) -> Iterator[control_pb2.Policy]:
        """Yield every revision from `from_revision` on (0: from the one in force on), in order and without a gap, until the caller stops.

        A lost connection is taken up again where it broke. To go on after a restart of your own, keep the last number seen:

            for policy in client.watch_policy(last_seen + 1): ...

        Raises:
            RevisionCompacted: that revision was compacted away; start again from the one in force.
            ControlUnavailable: the service stayed away for longer than all retries.
        """
        position = steps.Position(from_revision)
        for policy in self._stream(position.make_call):
            position.move_past(policy)
            yield policy

    def get_status(self) -> control_pb2.Status:
        """Return the desired policy, every engine's state, the newest roll-out, and what audits and the guard found."""
        return self._call(requests.get_status())

    def watch_status(self, interval_seconds: float = 1.0) -> Iterator[control_pb2.Status]:
        """Yield the status now, on every change and at least once per interval (0.1 to 60 s), until the caller stops or the service does."""
        return self._stream(lambda: requests.watch_status(interval_seconds))

    def list_engines(self) -> Iterator[control_pb2.EngineStatus]:
        """Yield every engine that was heard of within a day, by id."""
        return self._iterate(steps.list_engines())

    def watch_engines(self) -> Iterator[control_pb2.WatchEnginesResponse]:
        """Yield all engines once, then those whose state changes, until the caller stops or the service does."""
        return self._stream(requests.watch_engines)

    def wait_until_synced(self, revision: int, timeout_seconds: float, *, rollout: int | None = None) -> control_pb2.Status:
        """Return once every connected engine runs `revision` or a newer one, and that roll-out's candidate beside it (0: none).

        Raises:
            NotSynced: an engine refused it, none is connected, or the time is up.
        """
        return self._run(steps.wait_until_synced(revision, timeout_seconds, rollout))

    def upload_probe_set(self, directory: Path | str, *, progress: Progress | None = None, timeout_seconds: float = 600.0) -> probe_sets_pb2.ProbeSet:
        """Upload a directory with manifest.json and probes.safetensors; `progress` is called with the bytes sent and all there are.

        uploaded = client.upload_probe_set("build/mine/probe-set", progress=lambda sent, total: print(f"{sent / total:.0%}"))
        client.update_policy(Policy(probe_set=uploaded.name), fields=["probe_set"])

        Raises:
            ArtifactError: here or there, the set is broken.
            ProbeSetExists: its name belongs to other bytes.
        """
        return self._call(requests.upload_probe_set(ProbeSetUpload(Path(directory), progress).make_parts), timeout_seconds)

    def list_probe_sets(self) -> Iterator[probe_sets_pb2.ProbeSet]:
        """Yield the uploaded sets by name."""
        return self._iterate(steps.list_probe_sets())

    def get_probe_set(self, name: str) -> probe_sets_pb2.ProbeSet:
        """Return one set: its state, which engines it fits, and what refers to it."""
        return self._call(requests.get_probe_set(name))

    def delete_probe_set(self, name: str) -> None:
        """Delete a set.

        Raises:
            ProbeSetInUse: a policy in force, a roll-out or an engine uses it.
        """
        self._call(requests.delete_probe_set(name))

    def download_probe_set(
        self, name: str, directory: Path | str, *, sha256: str = "", progress: Progress | None = None, timeout_seconds: float = 600.0
    ) -> Path:
        """Write a set into a new directory, which appears whole or not at all; returns the directory.

        Raises:
            ArtifactError: what came is not what was announced, or the directory is there already.
        """
        with ProbeSetDownload(Path(directory), progress) as download:
            for part in self._stream(lambda: requests.download_probe_set(name, sha256), timeout_seconds):
                download.take(part)
            return download.finish()

    def start_rollout(self, candidate: Policy | int, **knobs: Unpack[Knobs]) -> rollouts_pb2.Rollout:
        """Serve a growing share of the requests under a candidate: a policy, or the number of a revision whose content it is.

        rollout = client.start_rollout(candidate, shares=[0.05, 0.5], interval_seconds=60, max_mismatch=0.05, comment="wider tiers")
        ended = client.wait_for_rollout(rollout.name, 3600)
        """
        return self._call(requests.start_rollout(candidate, knobs))

    def get_rollout(self, name: str | int = "") -> rollouts_pb2.Rollout:
        """Return a roll-out by name or number; empty: the one under way, or the newest."""
        return self._call(requests.get_rollout(name))

    def list_rollouts(self) -> Iterator[rollouts_pb2.Rollout]:
        """Yield all roll-outs, newest first."""
        return self._iterate(steps.list_rollouts())

    def promote_rollout(self, name: str | int = "", *, comment: str = "", etag: str = "") -> rollouts_pb2.Rollout:
        """Make the candidate the policy in force now; empty name: the one under way."""
        return self._call(requests.change_rollout("promote", name, comment=comment, etag=etag))

    def pause_rollout(self, name: str | int = "", *, comment: str = "", etag: str = "") -> rollouts_pb2.Rollout:
        """Keep the share as it is and stop the analysis."""
        return self._call(requests.change_rollout("pause", name, comment=comment, etag=etag))

    def resume_rollout(self, name: str | int = "", *, comment: str = "", etag: str = "") -> rollouts_pb2.Rollout:
        """Go on from the same share with a new interval."""
        return self._call(requests.change_rollout("resume", name, comment=comment, etag=etag))

    def abort_rollout(self, name: str | int = "", *, comment: str = "", etag: str = "") -> rollouts_pb2.Rollout:
        """Give all requests back to the policy in force."""
        return self._call(requests.change_rollout("abort", name, comment=comment, etag=etag))

    def watch_rollout(self, name: str | int = "", interval_seconds: float = 1.0) -> Iterator[rollouts_pb2.Rollout]:
        """Yield a roll-out now and whenever it changed (looked at once per interval), until it is promoted or aborted."""
        return self._iterate(steps.watch_rollout(name, interval_seconds))

    def wait_for_rollout(self, name: str | int, timeout_seconds: float, *, interval_seconds: float = 1.0) -> rollouts_pb2.Rollout:
        """Return a roll-out once it is promoted or aborted.

        Raises:
            NotSynced: it is not over in time; paused ones wait for an operator.
        """
        return self._run(steps.wait_for_rollout(name, timeout_seconds, interval_seconds))

    def list_audit_entries(self) -> Iterator[audit_log_pb2.AuditEntry]:
        """Yield the audit log, newest first: who changed what, before and after."""
        return self._iterate(steps.list_audit_entries())

    def _open_channel(self, credentials: Credentials) -> Any:
        return credentials.open_channel(self.address, OPTIONS)

    def _call(self, call: Call[_T], timeout_seconds: float | None = None) -> _T:
        attempts = self._make_attempts(call.is_repeatable, timeout_seconds or self.timeout_seconds)
        method = getattr(self._stubs[call.service], call.method)
        while True:
            try:
                return method(call.make_request(), timeout=attempts.get_seconds_left(), metadata=self._make_metadata())
            except grpc.RpcError as error:
                pause = attempts.find_pause(error)
                if pause is None:
                    raise self._translate(error) from error
            time.sleep(pause)

    def _stream(self, make_call: Callable[[], Call[_T]], timeout_seconds: float | None = None) -> Iterator[_T]:
        attempts = self._make_attempts(make_call().is_repeatable, timeout_seconds)
        while True:
            call = make_call()
            method = getattr(self._stubs[call.service], call.method)
            stream = method(call.make_request(), timeout=attempts.get_seconds_left(), metadata=self._make_metadata())
            try:
                for answer in stream:
                    attempts.succeed()
                    yield answer
                return
            except grpc.RpcError as error:
                pause = attempts.find_pause(error)
                if pause is None:
                    raise self._translate(error) from error
            finally:
                stream.cancel()
            time.sleep(pause)

    def _iterate(self, todo: Steps[_T]) -> Iterator[_T]:
        answer: Any = None
        while True:
            try:
                step = todo.send(answer)
            except StopIteration:
                return
            answer = None
            if isinstance(step, Call):
                answer = self._call(step)
            elif isinstance(step, Pause):
                time.sleep(step.seconds)
            else:
                yield step.value

    def _run(self, todo: Steps[_T]) -> _T:
        return next(iter(self._iterate(todo)))
