"""Verification of a probe set without torch: digest, structure and values, in pieces, so that memory stays bounded.

The control service verifies what is uploaded, every engine what it fetches, and `artifact.load` whatever it loads: one set of checks,
so that what one accepts the others do. The bytes may be anybody's.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from sedac.errors import ArtifactError
from sedac.policy.layout import ProbeSetSummary
from sedac.probe.manifest import FORMAT, Manifest, parse_manifest, refuse_duplicates

WEIGHTS = "probes.safetensors"
PARAMETERS = {"width": "neurons", "contextual": "threshold"}
"""Name of the tensor of a level's parameters, by reduction."""
_PIECE_BYTES = 1 << 20
_HEADER_BYTES, _HEADER_BYTES_PER_TENSOR = 4096, 512
_AGAIN, _TRAIN, _CALIBRATE = "copy the probe set again", "train the probe again", "calibrate the set again"
_KINDS = {"BF": "bfloat", "F": "float", "I": "int", "U": "uint"}
_DTYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "F32": ("float32", np.dtype("<f4")),
    "I32": ("int32", np.dtype("<i4")),
    "BF16": ("bfloat16", np.dtype("<u2")),  # as bits: numpy has no such type
}


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A set whose every byte was looked at."""

    manifest: Manifest
    size_bytes: int
    """Size of the weights."""
    levels_sha256: str
    """Digest over all that its levels and neurons are. If empty, it has none."""

    @property
    def summary(self) -> ProbeSetSummary:
        """What decides which engine can load it."""
        made = self.manifest
        return ProbeSetSummary(
            name=made.name,
            sha256=made.sha256,
            size_bytes=self.size_bytes,
            num_layers=made.num_layers,
            hidden_size=made.hidden_size,
            rank=made.rank,
            checkpoint_layers=tuple(p.layer for p in made.probes),
            levels_sha256=self.levels_sha256,
        )


@dataclass(frozen=True, kw_only=True)
class _Promise:
    """A tensor that the manifest promises."""

    dtype: str
    shape: tuple[int, ...]
    find_problem: Callable[[Iterator[np.ndarray[Any, Any]]], str]
    """Returns what is wrong with its values, given in pieces. Empty means that they are right."""
    remedy: str
    is_optional: bool = False
    is_level: bool = False

    def __str__(self) -> str:
        return f"{_DTYPES[self.dtype][0]} {self.shape}"

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _DTYPES[self.dtype][1].itemsize


def verify(manifest: bytes, path: Path) -> Verified:
    """Check a manifest and the file of its weights, which must be no link.

    Raises:
        ArtifactError: names the file, what was found and what was expected.
    """
    known = parse_manifest(manifest, str(path.with_name("manifest.json")))
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise ArtifactError(f"{path} is no regular file; {_AGAIN}")
            levels_sha256 = verify_weights(known, file, str(path))
        with safe_open(path, framework="numpy") as library:  # reads the header alone; the judge of the format is who loads it
            library.keys()
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} can't be read ({error}); {_AGAIN}") from error
    return Verified(manifest=known, size_bytes=found.st_size, levels_sha256=levels_sha256)


def verify_weights(manifest: Manifest, file: BinaryIO, source: str) -> str:
    """Check weights against their manifest and return the digest of their levels, empty where there are none.

    `file` must be seekable and stay as it is meanwhile; `source` names it in errors.

    Raises:
        ArtifactError: names the tensor, what was found and what was expected.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    digest = hashlib.sha256()
    for piece in _read_pieces(file, size, source):
        digest.update(piece)
    if digest.hexdigest() != manifest.sha256:
        raise ArtifactError(f"{source} has sha256 {digest.hexdigest()}, the manifest says {manifest.sha256}; {_AGAIN}")
    promises = _make_promises(manifest)
    places = _read_places(file, size, promises, source)
    levels = hashlib.sha256(_describe_levels(manifest))
    for name, promise in promises.items():
        if name not in places:
            continue
        if promise.is_level:
            levels.update(f"\n{name} {promise}\n".encode())
        pieces = _read_tensor(file, places[name], promise, source, levels if promise.is_level else None)
        problem = promise.find_problem(pieces)
        if problem:
            raise ArtifactError(f"{source}: {name} {problem}; {promise.remedy}")
    return levels.hexdigest() if manifest.levels else ""


def _make_promises(manifest: Manifest) -> dict[str, _Promise]:
    """Return by name what the weights must hold; see LREProbe (probe.py), Level and Neurons (levels.py)."""
    hidden, rank, size, layers = manifest.hidden_size, manifest.rank, manifest.intermediate_size, manifest.num_layers
    parts = {"down.weight": (rank, hidden), "norm.weight": (rank,), "norm.bias": (rank,), "out.weight": (1, rank), "out.bias": (1,)}
    promises = {
        f"{probe.layer}.{name}": _Promise(dtype="F32", shape=shape, find_problem=_find_not_finite, remedy=_TRAIN)
        for probe in manifest.probes
        for name, shape in parts.items()
    }

    def promise(
        name: str, dtype: str, shape: tuple[int, ...], find: Callable[[Iterator[np.ndarray[Any, Any]]], str], is_optional: bool = False
    ) -> None:
        """Note a tensor of the levels that the manifest promises."""
        promises[name] = _Promise(dtype=dtype, shape=shape, find_problem=find, remedy=_CALIBRATE, is_optional=is_optional, is_level=True)

    for level in manifest.levels:
        name = f"levels.{level.name}.{PARAMETERS[level.reduction]}"
        if level.reduction == "width":
            promise(name, "I32", (layers,), lambda pieces: _find_bad_count(pieces, size))
        else:
            promise(name, "F32", (layers,), _find_bad_threshold)
    for layer in range(layers if manifest.levels else 0):
        promise(f"neurons.{layer}.order", "I32", (size,), lambda pieces: _find_no_permutation(pieces, size))
        promise(f"neurons.{layer}.scale", "F32", (size,), _find_bad_scale)
        promise(f"neurons.{layer}.repair", "BF16", (size, hidden), _find_bfloat16_not_finite, is_optional=True)
    return promises


def _describe_levels(manifest: Manifest) -> bytes:
    names = [[level.name, level.reduction] for level in manifest.levels]
    return json.dumps(["sedac-levels/1", manifest.activation, manifest.score, names]).encode()


def _read_places(file: BinaryIO, size: int, promises: dict[str, _Promise], source: str) -> dict[str, int]:
    """Read the header and return where each tensor begins in the file; refuses all but the promised tensors, one after the other."""
    most = _HEADER_BYTES + _HEADER_BYTES_PER_TENSOR * len(promises)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 2 <= length <= min(most, size - 8):
        raise ArtifactError(f"{source}: its header has {length} bytes by its own account, at most {min(most, max(0, size - 8))} can be; {_AGAIN}")
    try:
        header = json.loads(b"".join(_read_pieces(file, length, source)).decode("utf-8"), object_pairs_hook=refuse_duplicates)
        metadata = header.pop("__metadata__", None)  # a list is popped by number
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{source}: its header is not that of safetensors ({str(error)[:200]}); {_AGAIN}") from error
    if metadata != {"format": FORMAT}:
        raise ArtifactError(f"{source}: its metadata is {ascii(metadata)[:80]}, expected {{'format': {FORMAT!r}}}; write it with `sedac-probes`")
    for name in header:
        if name not in promises:
            raise ArtifactError(f"{source}: tensor {ascii(name)[:80]} is not promised by the manifest, which knows {len(promises)}; write both again")
    spans: list[tuple[int, int, str]] = []
    for name, promise in promises.items():
        entry = header.get(name)
        if entry is None and promise.is_optional:
            continue
        found = _show(entry)
        if found != str(promise):
            raise ArtifactError(f"{source}: {name} is {found}, expected {promise}; {promise.remedy}")
        begin, end = _read_offsets(entry)
        if end - begin != promise.num_bytes:
            raise ArtifactError(f"{source}: {name} lies at bytes {begin} to {end}, expected {promise.num_bytes} bytes; {promise.remedy}")
        spans.append((begin, end, name))
    at, places = 0, {}
    for begin, end, name in sorted(spans):
        if begin != at:
            raise ArtifactError(f"{source}: {name} begins at byte {begin}, the one before it ends at {at}; {_AGAIN}")
        at, places[name] = end, 8 + length + begin
    if 8 + length + at != size:
        raise ArtifactError(f"{source} has {size} bytes, its tensors end at {8 + length + at}; {_AGAIN}")
    return places


def _show(entry: Any) -> str:
    """Return dtype and shape of a header's entry, as a promise is shown where they are kept."""
    if entry is None:
        return "no tensor"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return f"{ascii(entry)[:80]}"
    dtype, shape = entry["dtype"], entry["shape"]
    kind = re.fullmatch("(BF|F|I|U)([0-9]{1,2})", dtype) if isinstance(dtype, str) else None
    name = f"{_KINDS[kind[1]]}{kind[2]}" if kind else ascii(dtype)[:40]
    return f"{name} {tuple(shape)}"[:80] if isinstance(shape, list) and len(shape) < 9 and all(_is_count(n) for n in shape) else ascii(shape)[:80]


def _read_offsets(entry: dict[str, Any]) -> tuple[int, int]:
    offsets = entry["data_offsets"]
    if isinstance(offsets, list) and len(offsets) == 2 and all(_is_count(n) for n in offsets):
        return offsets[0], offsets[1]
    return 0, -1


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _read_pieces(file: BinaryIO, size: int, source: str) -> Iterator[bytes]:
    """Yield the next `size` bytes in pieces."""
    while size:
        piece = file.read(min(size, _PIECE_BYTES))
        if not piece:
            raise ArtifactError(f"{source} ends {size} bytes early; {_AGAIN}")
        size -= len(piece)
        yield piece


def _read_tensor(file: BinaryIO, begin: int, promise: _Promise, source: str, digest: hashlib._Hash | None) -> Iterator[np.ndarray[Any, Any]]:
    """Yield a tensor's numbers in pieces, flat, and add its bytes to a digest."""
    file.seek(begin)
    dtype, rest = _DTYPES[promise.dtype][1], b""
    for piece in _read_pieces(file, promise.num_bytes, source):
        if digest:
            digest.update(piece)
        whole = rest + piece
        end = len(whole) - len(whole) % dtype.itemsize
        rest = whole[end:]  # a read may end inside a number
        yield np.frombuffer(whole[:end], dtype)


def _find_not_finite(pieces: Iterator[np.ndarray[Any, Any]]) -> str:
    return "" if all(np.isfinite(piece).all() for piece in pieces) else "holds NaN or infinity"


def _find_bfloat16_not_finite(pieces: Iterator[np.ndarray[Any, Any]]) -> str:
    return "" if all(((piece & 0x7F80) != 0x7F80).all() for piece in pieces) else "holds NaN or infinity"


def _find_bad_scale(pieces: Iterator[np.ndarray[Any, Any]]) -> str:
    return "" if all((np.isfinite(piece) & (piece >= 0)).all() for piece in pieces) else "holds NaN, infinity or a negative number"


def _find_bad_threshold(pieces: Iterator[np.ndarray[Any, Any]]) -> str:
    return "" if all((piece >= 0).all() for piece in pieces) else "has thresholds below 0 or NaN"


def _find_bad_count(pieces: Iterator[np.ndarray[Any, Any]], most: int) -> str:
    return "" if all(((piece >= 0) & (piece <= most)).all() for piece in pieces) else f"has counts outside 0..{most}"


def _find_no_permutation(pieces: Iterator[np.ndarray[Any, Any]], size: int) -> str:
    seen = np.zeros(size, dtype=bool)
    for piece in pieces:
        if not ((piece >= 0) & (piece < size)).all():
            break
        seen[piece] = True
    return "" if seen.all() else f"is no permutation of 0..{size - 1}"
