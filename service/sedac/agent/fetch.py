"""Probe sets fetched from the control service into a cache of directories named by digest, verified before they are there.

The service's bytes may be anybody's: a set is whole and verified in the cache, or not in it. Called by the agent before it applies
a policy; several engines may share one cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import stat
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import grpc

from sedac.contract.credentials import Metadata
from sedac.contract.v1 import control_pb2, probe_sets_pb2, probe_sets_pb2_grpc
from sedac.errors import ArtifactError
from sedac.policy.layout import ProbeSetSummary
from sedac.probe.manifest import FORMAT, MAX_MANIFEST_BYTES
from sedac.probe.verify import WEIGHTS, Verified, verify

NUM_KEPT = 8
"""Number of probe sets that stay in a cache, the last used ones."""
_MAX_CHUNK_BYTES = 1 << 20
_SILENCE_SECONDS = 30.0
_LEFTOVER_SECONDS = 3600.0
_SHA256 = re.compile("[0-9a-f]{64}")
_INCOMING = ".incoming-"


@dataclass(frozen=True, kw_only=True)
class FetchedSet:
    """A probe set that lies verified in the cache."""

    directory: Path
    summary: ProbeSetSummary


async def fetch(channel: grpc.aio.Channel, reference: control_pb2.ProbeSetReference, cache_dir: Path, *, metadata: Metadata = ()) -> FetchedSet:
    """Return a set's directory in the cache, downloaded where it is not there; verified either way.

    Raises:
        ArtifactError: the service sent something else than it announced, or the cache can't be written; nothing of it is kept.
        TimeoutError: the service went silent in the middle.
        grpc.aio.AioRpcError: it can't be reached or does not have the set.
    """
    _check_reference(reference)
    found = await asyncio.to_thread(_find, cache_dir, reference)
    if found is None:
        incoming = await asyncio.to_thread(_make_incoming, cache_dir, reference.size_bytes)
        try:
            await _download(channel, reference, incoming, metadata)
            found = await asyncio.to_thread(_place, incoming, cache_dir, reference)
        finally:
            await asyncio.to_thread(shutil.rmtree, incoming, ignore_errors=True)
    await asyncio.to_thread(_prune, cache_dir, keep=found.manifest.sha256)
    return FetchedSet(directory=cache_dir / reference.sha256, summary=found.summary)


def _check_reference(reference: control_pb2.ProbeSetReference) -> None:
    if not _SHA256.fullmatch(reference.sha256):
        raise ArtifactError(f"the control service announced sha256 {reference.sha256[:80]!r}, expected 64 of 0-9 and a-f; update the service")
    if reference.size_bytes <= 0:
        raise ArtifactError(f"the control service announced {reference.size_bytes} bytes of {reference.name[:80]!r}; update the service")


def _find(cache_dir: Path, reference: control_pb2.ProbeSetReference) -> Verified | None:
    """Verify what the cache has of a digest; what is broken, no directory, or of another name is removed."""
    directory = cache_dir / reference.sha256
    try:
        found = _verify(directory)
    except (ArtifactError, OSError):
        found = None
    if found and (found.manifest.name, found.manifest.sha256) == (reference.name, reference.sha256):
        os.utime(directory)
        return found
    _remove(directory)
    return None


def _verify(directory: Path) -> Verified:
    if not stat.S_ISDIR(directory.lstat().st_mode):
        raise ArtifactError(f"{directory} is no directory; remove it")
    with open(os.open(directory / "manifest.json", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        manifest = file.read(MAX_MANIFEST_BYTES + 1)
    return verify(manifest, directory / WEIGHTS)


def _remove(directory: Path) -> None:
    """Remove a directory, or a link to one and never what it leads to."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(directory.lstat().st_mode):
            shutil.rmtree(directory, ignore_errors=True)
        else:
            directory.unlink()


def _make_incoming(cache_dir: Path, size_bytes: int) -> Path:
    try:
        cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        free = shutil.disk_usage(cache_dir).free
        if size_bytes > free:
            raise ArtifactError(f"the set has {size_bytes} bytes, {cache_dir} has room for {free}; make room")
        for left in cache_dir.glob(f"{_INCOMING}*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.lstat().st_mtime > _LEFTOVER_SECONDS:
                    _remove(left)
        return Path(tempfile.mkdtemp(prefix=_INCOMING, dir=cache_dir))
    except OSError as error:
        raise ArtifactError(f"{cache_dir} can't be written ({error.strerror}); name another directory for fetched probe sets") from error


async def _download(channel: grpc.aio.Channel, reference: control_pb2.ProbeSetReference, incoming: Path, metadata: Metadata) -> None:
    """Write what the service sends into a directory of ours; refuses it as soon as it is not what was announced."""
    request = probe_sets_pb2.DownloadProbeSetRequest(name=reference.name, sha256=reference.sha256)
    call = probe_sets_pb2_grpc.ProbeSetsStub(channel).DownloadProbeSet(request, metadata=metadata)
    received, header = 0, None
    try:
        with (incoming / WEIGHTS).open("xb") as file:
            while (part := await _read(call)) is not None:
                if header is None:
                    header = _take_header(part, reference)
                    await asyncio.to_thread((incoming / "manifest.json").write_bytes, header.manifest)
                    continue
                received += len(part.chunk)
                if not 0 < len(part.chunk) <= _MAX_CHUNK_BYTES or received > reference.size_bytes:
                    raise _refuse(reference, f"a part with {len(part.chunk)} bytes of weights, {received} together; announced were", "bytes")
                await asyncio.to_thread(file.write, part.chunk)
            if received != reference.size_bytes:
                raise _refuse(reference, f"{received} bytes of weights; announced were", "bytes")
            await asyncio.to_thread(_sync, file)
    except OSError as error:
        if isinstance(error, TimeoutError | ConnectionError):
            raise
        raise ArtifactError(f"{incoming} can't be written ({error.strerror}); make room, or name another directory for fetched sets") from error
    finally:
        call.cancel()


async def _read(call: grpc.aio.UnaryStreamCall) -> probe_sets_pb2.DownloadProbeSetResponse | None:
    try:
        async with asyncio.timeout(_SILENCE_SECONDS):
            part = await call.read()
    except TimeoutError:
        raise TimeoutError(f"the control service sent nothing for {_SILENCE_SECONDS:g} s in the middle of a probe set") from None
    return None if part is grpc.aio.EOF else part


def _take_header(part: probe_sets_pb2.DownloadProbeSetResponse, reference: control_pb2.ProbeSetReference) -> probe_sets_pb2.ProbeSetHeader:
    header = part.header
    if (header.name, header.sha256, header.size_bytes, header.format) != (reference.name, reference.sha256, reference.size_bytes, FORMAT):
        found = f"a header of {header.name[:80]!r}, {header.size_bytes} bytes, sha256 {header.sha256[:12]!r}, format {header.format[:40]!r}; expected"
        raise _refuse(reference, found, f"bytes, format {FORMAT}")
    if len(header.manifest) > MAX_MANIFEST_BYTES:
        raise _refuse(reference, f"a manifest of {len(header.manifest)} bytes, at most {MAX_MANIFEST_BYTES} are read; the weights have", "bytes")
    return header


def _refuse(reference: control_pb2.ProbeSetReference, what: str, unit: str) -> ArtifactError:
    return ArtifactError(
        f"probe set {reference.name!r}: the control service sent {what} {reference.size_bytes} {unit}, sha256 {reference.sha256[:12]}...; "
        "look at what answers under its address"
    )


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _place(incoming: Path, cache_dir: Path, reference: control_pb2.ProbeSetReference) -> Verified:
    """Verify what came and move it to its place; where another process was first, its set stays."""
    found = _verify(incoming)
    if (found.manifest.name, found.manifest.sha256) != (reference.name, reference.sha256):
        manifest = f"{found.manifest.name!r} with sha256 {found.manifest.sha256[:12]}..."
        raise _refuse(reference, f"the manifest of {manifest}; expected {reference.name!r},", "bytes")
    try:
        incoming.rename(cache_dir / reference.sha256)
    except OSError as error:
        first = _find(cache_dir, reference)
        if first is None:
            raise ArtifactError(f"{cache_dir / reference.sha256} can't be made ({error.strerror}); look at what lies there") from error
        return first
    return found


def _prune(cache_dir: Path, keep: str) -> None:
    used: list[tuple[float, Path]] = []
    for path in cache_dir.iterdir():
        if _SHA256.fullmatch(path.name) and path.name != keep:
            with contextlib.suppress(FileNotFoundError):
                used.append((path.lstat().st_mtime, path))
    for _, path in sorted(used, reverse=True)[NUM_KEPT - 1 :]:
        _remove(path)
