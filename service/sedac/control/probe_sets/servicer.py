"""The gRPC service of probe sets: operators upload, list and delete them, engines download what a policy names.

What comes in is measured as it comes: its size, how much of it, how fast. Disk and verification never hold up the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import grpc

from sedac.contract.v1 import probe_sets_pb2, probe_sets_pb2_grpc, rollouts_pb2
from sedac.control.access.auth import Caller, get_caller
from sedac.control.base.settings import ControlSettings
from sedac.control.base.status import answering, refuse
from sedac.control.fleet.fleet import Fleet
from sedac.control.policy.store import POLICY_NAME, Store
from sedac.control.policy.watches import get_limit
from sedac.control.probe_sets.staging import StagedWeights
from sedac.control.probe_sets.store import ProbeSetStore, StoredProbeSet
from sedac.errors import ControlUnavailable, LimitExceeded, ProbeSetExists, ProbeSetInUse, ProbeSetNotFound, RevisionCompacted, RevisionNotFound
from sedac.policy.layout import find_fit_problem
from sedac.probe.manifest import FORMAT, MAX_MANIFEST_BYTES, parse_manifest

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_NAME, _SHA256 = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}"), re.compile("[0-9a-f]{64}")
_MAX_CHUNK_BYTES, _SENT_CHUNK_BYTES = 1 << 20, 512 << 10
_LEAST_BYTES_PER_SECOND = 64 << 10
_MAX_DOWNLOADS = 64
_NUM_THREADS = 8
_UNDER_WAY = (rollouts_pb2.ROLLOUT_STATE_PROGRESSING, rollouts_pb2.ROLLOUT_STATE_PAUSED)
_Messages = AsyncIterator[probe_sets_pb2.UploadProbeSetRequest]


class ProbeSetsServicer(probe_sets_pb2_grpc.ProbeSetsServicer):
    """What operators and engines call."""

    def __init__(self, probe_sets: ProbeSetStore, store: Store, fleet: Fleet, settings: ControlSettings, lock: asyncio.Lock) -> None:
        """`lock` is held by whoever checks a policy until it is in force."""
        self._probe_sets, self._store, self._fleet, self._settings, self._lock = probe_sets, store, fleet, settings, lock
        self._coming: dict[object, probe_sets_pb2.ProbeSetHeader] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._downloads = asyncio.Semaphore(_MAX_DOWNLOADS)
        self._threads = ThreadPoolExecutor(max_workers=_NUM_THREADS, thread_name_prefix="probe-sets")
        self._announce()

    async def close(self) -> None:
        """Let what is being stored come to its end."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._threads.shutdown(wait=False)

    async def UploadProbeSet(self, messages: _Messages, context: grpc.aio.ServicerContext) -> probe_sets_pb2.ProbeSet:  # noqa: N802
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
            if request.page_token and not _NAME.fullmatch(request.page_token):
                raise refuse("page_token", f"{request.page_token[:40]!r} was not made by this service; start again without one")
            records = self._probe_sets.records
            coming = self._find_coming()
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
            coming = self._find_coming()
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
            record, manifest, file = await self._in_thread(self._probe_sets.open, request.name)
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
                while chunk := await self._in_thread(file.read, _SENT_CHUNK_BYTES):
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

    async def _upload(self, messages: _Messages, caller: Caller) -> StoredProbeSet:
        header = await self._read_header(messages)
        same = self._probe_sets.find_same(header.name, header.sha256, header.manifest)
        if same:
            return same
        for engine in self._fleet.list_engines():
            attached = engine.layout
            if engine.connected and attached.probe_set == header.name and attached.probe_set_sha256 not in ("", header.sha256):
                digest = f"sha256 {attached.probe_set_sha256[:12]}..., yours has {header.sha256[:12]}..."
                raise ProbeSetExists(f"engine {engine.id} started with another set named {header.name!r} ({digest}); choose another name")
        with self._hold(header):
            staged = self._probe_sets.stage()
            try:
                await self._receive(messages, header, staged)
            except BaseException:
                self._threads.submit(staged.discard)  # not awaited: a call whose caller has gone may be cancelled again
                raise
            return await self._finish(self._store_set(header, staged, caller))

    async def _read_header(self, messages: _Messages) -> probe_sets_pb2.ProbeSetHeader:
        first = await self._read(messages, self._settings.upload_silence_seconds)
        if first is None or first.WhichOneof("part") != "header":
            raise refuse("header", "the first message must be a header")
        header = first.header
        if not _NAME.fullmatch(header.name):
            raise refuse("header.name", f"{header.name[:80]!a}: use 1 to 64 of a-z, 0-9, ., - and _, beginning with a letter or digit")
        if not _SHA256.fullmatch(header.sha256):
            raise refuse("header.sha256", f"{header.sha256[:80]!a} is no sha256; give 64 of 0-9 and a-f")
        if header.format != FORMAT:
            raise refuse("header.format", f"{header.format[:80]!a} is unknown; only {FORMAT} is taken: write the set with `sedac-probes`")
        if header.size_bytes <= 0:
            raise refuse("header.size_bytes", f"{header.size_bytes} is not over 0; announce the size of the weights")
        if len(header.manifest) > MAX_MANIFEST_BYTES:
            raise LimitExceeded(
                f"header.manifest has {len(header.manifest)} bytes, at most {MAX_MANIFEST_BYTES} are taken; write it with `sedac-probes`"
            )
        manifest = await self._in_thread(parse_manifest, header.manifest, "header.manifest")
        for name, stated, found in (("name", header.name, manifest.name), ("sha256", header.sha256, manifest.sha256)):
            if stated != found:
                raise refuse(f"header.{name}", f"{stated!r} is not the manifest's, {found!r}; send the header of this very set")
        return header

    @contextlib.contextmanager
    def _hold(self, header: probe_sets_pb2.ProbeSetHeader) -> Iterator[None]:
        """Count an upload and its bytes while the block runs."""
        limit = self._settings.max_uploads
        if len(self._coming) >= limit:
            raise LimitExceeded(f"{limit} uploads run already, which is the limit; call again later, or raise SEDAC_CONTROL_MAX_UPLOADS")
        self._probe_sets.check_room(header.size_bytes, sum(other.size_bytes for other in self._coming.values()))
        key = object()
        self._coming[key] = header
        try:
            yield
        finally:
            del self._coming[key]

    async def _receive(self, messages: _Messages, header: probe_sets_pb2.ProbeSetHeader, staged: StagedWeights) -> None:
        """Write the announced bytes, no more and no fewer, in time."""
        silence, received = self._settings.upload_silence_seconds, 0
        end = asyncio.get_running_loop().time() + silence + header.size_bytes / _LEAST_BYTES_PER_SECOND
        while True:
            part = await self._read(messages, min(silence, end - asyncio.get_running_loop().time()))
            if part is None:
                break
            if part.WhichOneof("part") != "chunk" or not 0 < len(part.chunk) <= _MAX_CHUNK_BYTES:
                raise refuse("chunk", f"{len(part.chunk)} bytes; after the header come chunks of 1 to {_MAX_CHUNK_BYTES} bytes")
            received += len(part.chunk)
            if received > header.size_bytes:
                raise refuse("chunk", f"{received} bytes so far, announced were {header.size_bytes}; announce what you send")
            await self._in_thread(staged.write, part.chunk)
        if received < header.size_bytes:
            raise refuse("chunk", f"{received} bytes in all, announced were {header.size_bytes}; send the whole file")

    async def _read(self, messages: _Messages, seconds: float) -> probe_sets_pb2.UploadProbeSetRequest | None:
        try:
            async with asyncio.timeout(seconds):
                return await anext(messages, None)
        except TimeoutError:
            least = f"no chunk within {self._settings.upload_silence_seconds:g} s, or under {_LEAST_BYTES_PER_SECOND} bytes a second in all"
            raise LimitExceeded(f"the upload is too slow: {least}; upload again over a faster way (SEDAC_CONTROL_UPLOAD_SILENCE_SECONDS)") from None

    async def _store_set(self, header: probe_sets_pb2.ProbeSetHeader, staged: StagedWeights, caller: Caller) -> StoredProbeSet:
        try:
            verified = await self._in_thread(self._probe_sets.verify, staged, header.manifest)
            record = await self._in_thread(self._probe_sets.add, staged, header.manifest, verified, caller)
        finally:
            await self._in_thread(staged.discard)
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
            await self._in_thread(self._probe_sets.remove, name, caller)
            self._announce()
        _log.info("probe set %s deleted by %s", name, caller.author)

    def _announce(self) -> None:
        self._fleet.probe_sets = {name: record.summary for name, record in self._probe_sets.records.items()}
        self._fleet.deleted_probe_sets = self._probe_sets.deleted

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

    def _find_coming(self) -> dict[str, probe_sets_pb2.ProbeSetHeader]:
        return {header.name: header for header in self._coming.values()}

    async def _in_thread(self, function: Callable[..., _T], *values: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, functools.partial(function, *values))

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
