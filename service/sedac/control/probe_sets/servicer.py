"""The gRPC service of probe sets: operators upload, list and delete them, engines download what a policy names.

What comes in is measured as it comes: its size, how much of it, how fast. Disk and verification never hold up the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import grpc

from sedac.contract.v1 import probe_sets_pb2, probe_sets_pb2_grpc, rollouts_pb2
from sedac.control.access.auth import Caller, get_caller
from sedac.control.base.pages import get_limit, refuse_token
from sedac.control.base.settings import ControlSettings
from sedac.control.base.status import answering
from sedac.control.fleet.fitting import NamedProbeSets
from sedac.control.fleet.fleet import Fleet
from sedac.control.probe_sets.record import StoredProbeSet
from sedac.control.probe_sets.staging import StagedWeights
from sedac.control.probe_sets.store import ProbeSetStore
from sedac.control.probe_sets.uploads import NAME, Messages, Threads, Uploads
from sedac.control.revisions.store import POLICY_NAME, Store
from sedac.errors import ControlUnavailable, LimitExceeded, ProbeSetExists, ProbeSetInUse, ProbeSetNotFound, RevisionCompacted, RevisionNotFound
from sedac.policy.layout import find_fit_problem
from sedac.probe.manifest import FORMAT

_log = logging.getLogger(__name__)
_SENT_CHUNK_BYTES = 512 << 10
_MAX_DOWNLOADS = 64
_UNDER_WAY = (rollouts_pb2.ROLLOUT_STATE_PROGRESSING, rollouts_pb2.ROLLOUT_STATE_PAUSED)


class ProbeSetsServicer(probe_sets_pb2_grpc.ProbeSetsServicer):
    """What operators and engines call."""

    def __init__(self, probe_sets: ProbeSetStore, store: Store, fleet: Fleet, settings: ControlSettings, lock: asyncio.Lock) -> None:
        """`lock` is held by whoever checks a policy until it is in force."""
        self._probe_sets, self._store, self._fleet, self._settings, self._lock = probe_sets, store, fleet, settings, lock
        self._threads = Threads()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._downloads = asyncio.Semaphore(_MAX_DOWNLOADS)
        self._uploads = Uploads(probe_sets, settings, self._threads)
        self._announce()

    async def close(self) -> None:
        """Let what is being stored come to its end."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._threads.close()

    async def UploadProbeSet(self, messages: Messages, context: grpc.aio.ServicerContext) -> probe_sets_pb2.ProbeSet:  # noqa: N802
        """Take a set whole; see the contract."""
        async with answering(context):
            return (await self._to_protos([await self._upload(aiter(messages), get_caller(context))]))[0]
        raise AssertionError("unreachable: answering() ends the call")

    async def ListProbeSets(  # noqa: N802
        self, request: probe_sets_pb2.ListProbeSetsRequest, context: grpc.aio.ServicerContext
    ) -> probe_sets_pb2.ListProbeSetsResponse:
        """Return one page by name; the token is the last name of the page before."""
        async with answering(context):
            limit = get_limit(request.page_size)
            if request.page_token and not NAME.fullmatch(request.page_token):
                raise refuse_token(request.page_token)
            records = self._probe_sets.records
            coming = self._uploads.list()
            names = sorted({*records, *coming})
            page = [name for name in names if name > request.page_token]
            found = await self._to_protos(records[name] for name in page[:limit] if name in records)
            found += [_describe(coming[name]) for name in page[:limit] if name not in records]
            found.sort(key=lambda probe_set: probe_set.name)
            return probe_sets_pb2.ListProbeSetsResponse(probe_sets=found, next_page_token=page[limit - 1] if len(page) > limit else "")
        raise AssertionError("unreachable: answering() ends the call")

    async def GetProbeSet(self, request: probe_sets_pb2.GetProbeSetRequest, context: grpc.aio.ServicerContext) -> probe_sets_pb2.ProbeSet:  # noqa: N802
        """Return one set, and who can load it."""
        async with answering(context):
            coming = self._uploads.list()
            if request.name not in self._probe_sets.records and request.name in coming:
                return _describe(coming[request.name])
            return (await self._to_protos([self._probe_sets.find(request.name)]))[0]
        raise AssertionError("unreachable: answering() ends the call")

    async def DeleteProbeSet(  # noqa: N802
        self, request: probe_sets_pb2.DeleteProbeSetRequest, context: grpc.aio.ServicerContext
    ) -> probe_sets_pb2.DeleteProbeSetResponse:
        """Delete a set that nothing names."""
        async with answering(context):
            await self._finish(self._delete(request.name, get_caller(context)))
            return probe_sets_pb2.DeleteProbeSetResponse()
        raise AssertionError("unreachable: answering() ends the call")

    async def DownloadProbeSet(self, request: probe_sets_pb2.DownloadProbeSetRequest, context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        """Send the header, then the weights."""
        async with answering(context), self._downloads:
            record, manifest, file = await self._threads.run(self._probe_sets.open, request.name)
            with contextlib.closing(file):
                found = record.summary
                if request.sha256 not in ("", found.sha256):
                    raise ProbeSetNotFound(
                        f"probe set {request.name!r} has sha256 {found.sha256}, not {request.sha256[:64]!r}; ask for that one, or for any"
                    )
                header = probe_sets_pb2.ProbeSetHeader(
                    name=found.name, size_bytes=found.size_bytes, sha256=found.sha256, format=FORMAT, manifest=manifest
                )
                await self._send(context, probe_sets_pb2.DownloadProbeSetResponse(header=header))
                while chunk := await self._threads.run(file.read, _SENT_CHUNK_BYTES):
                    await self._send(context, probe_sets_pb2.DownloadProbeSetResponse(chunk=chunk))

    async def _send(self, context: grpc.aio.ServicerContext, part: probe_sets_pb2.DownloadProbeSetResponse) -> None:
        if self._fleet.closing:
            raise ControlUnavailable("the control service is stopping; download again when it is back")
        seconds = self._settings.upload_silence_seconds
        try:
            async with asyncio.timeout(seconds):
                await context.write(part)
        except TimeoutError:
            raise LimitExceeded(f"nothing was taken for {seconds:g} s; download again and keep reading") from None

    async def _upload(self, messages: Messages, caller: Caller) -> StoredProbeSet:
        header = await self._uploads.read_header(messages)
        same = self._probe_sets.find_same(header.name, header.sha256, header.manifest)
        if same:
            return same
        for engine in self._fleet.list_engines():
            attached = engine.layout
            if engine.connected and attached.probe_set == header.name and attached.probe_set_sha256 not in ("", header.sha256):
                digest = f"sha256 {attached.probe_set_sha256[:12]}..., yours has {header.sha256[:12]}..."
                raise ProbeSetExists(f"engine {engine.id} started with another set named {header.name!r} ({digest}); choose another name")
        with self._uploads.hold(header):
            staged = self._probe_sets.stage()
            try:
                await self._uploads.receive(messages, header, staged)
            except BaseException:
                self._threads.submit(staged.discard)  # not awaited: a call whose caller has gone may be cancelled again
                raise
            return await self._finish(self._store_set(header, staged, caller))

    async def _store_set(self, header: probe_sets_pb2.ProbeSetHeader, staged: StagedWeights, caller: Caller) -> StoredProbeSet:
        try:
            verified = await self._threads.run(self._probe_sets.verify, staged, header.manifest)
            record = await self._threads.run(self._probe_sets.add, staged, header.manifest, verified, caller)
        finally:
            await self._threads.run(staged.discard)
        self._announce()
        _log.info("probe set %s by %s: %d bytes, sha256 %s", header.name, caller.author, header.size_bytes, header.sha256)
        return record

    async def _delete(self, name: str, caller: Caller) -> None:
        async with self._lock:  # no policy that names the set may come into force between the check and the act
            self._probe_sets.find(name)
            references = (await self._find_references()).get(name)
            if references:
                raise ProbeSetInUse(
                    f"probe set {name!r} is used by {', '.join(references)}; name another set there first, and wait until it is in force"
                )
            await self._threads.run(self._probe_sets.remove, name, caller)
            self._announce()
        _log.info("probe set %s deleted by %s", name, caller.author)

    def _announce(self) -> None:
        stored = {name: record.summary for name, record in self._probe_sets.records.items()}
        self._fleet.probe_sets = NamedProbeSets(stored=stored, deleted=self._probe_sets.deleted)

    async def _find_references(self) -> dict[str, list[str]]:
        """Return by set what names it: the policy in force, a roll-out under way, engines that still run what was in force before."""
        fleet, found = self._fleet, defaultdict[str, list[str]](list)
        rollout, candidate = fleet.rollout, fleet.candidate
        if fleet.desired:
            found[fleet.desired.policy.probe_set].append(POLICY_NAME)
        if candidate:
            found[candidate.policy.probe_set].append(f"rollouts/{candidate.rollout}")
        elif rollout and rollout.state in _UNDER_WAY:
            found[rollout.policy.probe_set].append(rollout.name)
        known: dict[int, str] = {}
        for engine in fleet.list_engines():
            if engine.connected:
                if engine.active_revision not in known:
                    known[engine.active_revision] = await self._find_named(engine.active_revision)
                active = {known[engine.active_revision]}
                if engine.active_rollout and rollout and rollout.number == engine.active_rollout:
                    active.add(rollout.policy.probe_set)
                for name in active:
                    found[name].append(f"engines/{engine.id}")
        return found

    async def _find_named(self, revision: int) -> str:
        """Return the set that a revision of the policy names; empty where nobody knows it any more."""
        try:
            return (await asyncio.to_thread(self._store.get, revision)).policy.probe_set
        except (RevisionNotFound, RevisionCompacted):
            return ""

    async def _to_protos(self, records: Iterable[StoredProbeSet]) -> list[probe_sets_pb2.ProbeSet]:
        references = await self._find_references()
        layouts = {engine.id: engine.layout for engine in self._fleet.list_engines() if engine.connected}
        found = []
        for record in records:
            message = record.to_proto()
            for engine_id, layout in layouts.items():
                message.engines.add(engine_id=engine_id, problem=find_fit_problem(record.summary, layout))
            if not layouts or any(not fit.problem for fit in message.engines):
                message.state = probe_sets_pb2.PROBE_SET_STATE_LOADABLE
            message.referenced_by.extend(references.get(record.summary.name, ()))
            found.append(message)
        return found

    async def _finish(self, change: Any) -> Any:
        """Run a change to its end even when its caller has gone: what is stored must be announced too."""
        task = asyncio.create_task(change)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)


def _describe(coming: probe_sets_pb2.ProbeSetHeader) -> probe_sets_pb2.ProbeSet:
    return probe_sets_pb2.ProbeSet(
        name=coming.name, sha256=coming.sha256, size_bytes=coming.size_bytes, format=coming.format, state=probe_sets_pb2.PROBE_SET_STATE_STAGED
    )
