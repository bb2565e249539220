"""Uploads on their way: what comes in is measured as it comes, its size, how much of it, how fast. Lives on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sedac.contract.v1 import probe_sets_pb2
from sedac.control.base.settings import ControlSettings
from sedac.control.base.status import refuse
from sedac.control.probe_sets.staging import StagedWeights
from sedac.control.probe_sets.store import ProbeSetStore
from sedac.errors import LimitExceeded
from sedac.probe.manifest import FORMAT, MAX_MANIFEST_BYTES, parse_manifest

_T = TypeVar("_T")
NAME, _SHA256 = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}"), re.compile("[0-9a-f]{64}")
_MAX_CHUNK_BYTES = 1 << 20
_LEAST_BYTES_PER_SECOND = 64 << 10
_NUM_THREADS = 8
Messages = AsyncIterator[probe_sets_pb2.UploadProbeSetRequest]


class Threads:
    """Worker threads for disk and verification, which must not hold up the event loop."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=_NUM_THREADS, thread_name_prefix="probe-sets")

    async def run(self, function: Callable[..., _T], *values: Any) -> _T:
        """Return what `function` makes of the values, on one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, functools.partial(function, *values))

    def submit(self, function: Callable[[], Any]) -> None:
        """Have `function` run on one of the threads, and wait for nothing."""
        self._pool.submit(function)

    def close(self) -> None:
        """Take nothing more; what runs comes to its end."""
        self._pool.shutdown(wait=False)


class Uploads:
    """The uploads that are on their way to one store."""

    def __init__(self, probe_sets: ProbeSetStore, settings: ControlSettings, threads: Threads) -> None:
        self._probe_sets, self._settings, self._threads = probe_sets, settings, threads
        self._coming: dict[object, probe_sets_pb2.ProbeSetHeader] = {}

    def list(self) -> dict[str, probe_sets_pb2.ProbeSetHeader]:
        """Return what is coming in, by name."""
        return {header.name: header for header in self._coming.values()}

    async def read_header(self, messages: Messages) -> probe_sets_pb2.ProbeSetHeader:
        """Return what an upload begins with, checked as far as it can be without the weights.

        Raises:
            PolicyInvalid: it is no header, or it contradicts its manifest.
            LimitExceeded: it came too late, or its manifest is too large.
            ArtifactError: its manifest is none.
        """
        first = await self._read(messages, self._settings.upload_silence_seconds)
        if first is None or first.WhichOneof("part") != "header":
            raise refuse("header", "the first message must be a header")
        header = first.header
        if not NAME.fullmatch(header.name):
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
        manifest = await self._threads.run(parse_manifest, header.manifest, "header.manifest")
        for name, stated, found in (("name", header.name, manifest.name), ("sha256", header.sha256, manifest.sha256)):
            if stated != found:
                raise refuse(f"header.{name}", f"{stated!r} is not the manifest's, {found!r}; send the header of this very set")
        return header

    @contextlib.contextmanager
    def hold(self, header: probe_sets_pb2.ProbeSetHeader) -> Iterator[None]:
        """Count an upload and its bytes while the block runs.

        Raises:
            LimitExceeded: too many uploads run, or there is no room for its weights.
        """
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

    async def receive(self, messages: Messages, header: probe_sets_pb2.ProbeSetHeader, staged: StagedWeights) -> None:
        """Write the announced bytes, no more and no fewer, in time.

        Raises:
            PolicyInvalid: what came is not what was announced.
            LimitExceeded: it came too slowly.
            StoreFailed: the disk is full or broken.
        """
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
            await self._threads.run(staged.write, part.chunk)
        if received < header.size_bytes:
            raise refuse("chunk", f"{received} bytes in all, announced were {header.size_bytes}; send the whole file")

    async def _read(self, messages: Messages, seconds: float) -> probe_sets_pb2.UploadProbeSetRequest | None:
        try:
            async with asyncio.timeout(seconds):
                return await anext(messages, None)
        except TimeoutError:
            least = f"no chunk within {self._settings.upload_silence_seconds:g} s, or under {_LEAST_BYTES_PER_SECOND} bytes a second in all"
            raise LimitExceeded(f"the upload is too slow: {least}; upload again over a faster way (SEDAC_CONTROL_UPLOAD_SILENCE_SECONDS)") from None
