"""Probe sets between a directory and the wire: what an upload sends, and where a download lands. No torch."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

from sedac.contract.v1 import probe_sets_pb2
from sedac.errors import ArtifactError
from sedac.probe.manifest import read_manifest

CHUNK_BYTES = 512 << 10
"""Bytes of weights in one message. The contract allows 1 MiB."""
_MANIFEST, _WEIGHTS = "manifest.json", "probes.safetensors"
Progress = Callable[[int, int], None]
"""Called with the number of bytes sent or received so far, and with the number of all bytes."""


class ProbeSetUpload:
    """One directory on its way to the service."""

    def __init__(self, directory: Path, progress: Progress | None = None) -> None:
        """Read the manifest and the weights' digest.

        Raises:
            ArtifactError: a file is missing or can't be read, or the weights are not the manifest's.
        """
        self._weights = directory / _WEIGHTS
        manifest = read_manifest(directory)
        try:
            with self._weights.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            self.header = probe_sets_pb2.ProbeSetHeader(
                name=manifest.name,
                size_bytes=self._weights.stat().st_size,
                sha256=digest,
                format=manifest.format,
                manifest=(directory / _MANIFEST).read_bytes(),
            )
        except OSError as error:
            raise ArtifactError(f"{error.filename} can't be read: {error.strerror}; name a directory with {_MANIFEST} and {_WEIGHTS}") from error
        if manifest.sha256 != digest:
            raise ArtifactError(
                f"{self._weights} has sha256 {digest[:12]}..., its manifest states {manifest.sha256[:12] or 'none'}...; one of them was changed: "
                "write the set again with `sedac-probes`"
            )
        self._progress = progress

    def make_parts(self) -> Iterator[probe_sets_pb2.UploadProbeSetRequest]:
        """Yield the header, then the weights in chunks."""
        yield probe_sets_pb2.UploadProbeSetRequest(header=self.header)
        sent = 0
        with self._weights.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield probe_sets_pb2.UploadProbeSetRequest(chunk=chunk)
                sent += len(chunk)
                if self._progress:
                    self._progress(sent, self.header.size_bytes)


class ProbeSetDownload:
    """One set on its way into a directory, which appears whole or not at all: a context manager that `take`s message by message."""

    def __init__(self, directory: Path, progress: Progress | None = None) -> None:
        self._directory, self._progress = directory, progress
        self._staged: Path | None = None
        self._file: IO[bytes] | None = None
        self._header = probe_sets_pb2.ProbeSetHeader()
        self._digest, self._received = hashlib.sha256(), 0

    def __enter__(self) -> ProbeSetDownload:
        """Make the place where the files are gathered, beside the directory.

        Raises:
            ArtifactError: the directory is there already and not empty, or nothing can be written beside it.
        """
        target = self._directory
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ArtifactError(f"{target} is there already; name a new or empty directory")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._staged = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
            self._file = (self._staged / _WEIGHTS).open("wb")
        except OSError as error:
            raise ArtifactError(f"{target} can't be written: {error.strerror}; name a directory elsewhere") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file:
            self._file.close()
        if self._staged:
            shutil.rmtree(self._staged, ignore_errors=True)

    def take(self, part: probe_sets_pb2.DownloadProbeSetResponse) -> None:
        """Write one message's bytes; a header starts again, as a repeated call does."""
        assert self._file
        if part.HasField("header"):
            self._header, self._digest, self._received = part.header, hashlib.sha256(), 0
            self._file.seek(0)
            self._file.truncate()
            return
        self._file.write(part.chunk)
        self._digest.update(part.chunk)
        self._received += len(part.chunk)
        if self._progress:
            self._progress(self._received, self._header.size_bytes)

    def finish(self) -> Path:
        """Check the bytes against the header, then move the directory to its place and return it.

        Raises:
            ArtifactError: what came is not what was announced.
        """
        assert self._file
        assert self._staged
        header, digest = self._header, self._digest.hexdigest()
        if (self._received, digest) != (header.size_bytes, header.sha256):
            raise ArtifactError(
                f"{header.name!r} arrived with {self._received} bytes and sha256 {digest[:12]}..., announced were {header.size_bytes} and "
                f"{header.sha256[:12]}...; download it again"
            )
        self._file.flush()
        os.fsync(self._file.fileno())
        (self._staged / _MANIFEST).write_bytes(header.manifest)
        self._staged.chmod(0o755)
        if self._directory.exists():
            self._directory.rmdir()  # it is empty
        self._staged.rename(self._directory)
        return self._directory
