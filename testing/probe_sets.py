"""Small probe sets as bytes, written without torch or safetensors, so that anything about them can be made wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sedac.contract.v1 import probe_sets_pb2

LAYERS, HIDDEN, RANK, NEURONS = 12, 8, 4, 6
LEVELS = (("width-20", "width"), ("contextual-30", "contextual"))
Tensor = tuple[str, tuple[int, ...], bytes]
"""safetensors dtype, shape, bytes"""


def make_tensors(layers: Sequence[int] = (2, 5, 8), *, rank: int = RANK, levels: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """Return good tensors by name; the levels do not depend on the seed."""
    chance, fixed, found = np.random.default_rng(seed), np.random.default_rng(7), {}
    shapes = {"down.weight": (rank, HIDDEN), "norm.weight": (rank,), "norm.bias": (rank,), "out.weight": (1, rank), "out.bias": (1,)}
    for layer in layers:
        for name, shape in shapes.items():
            found[f"{layer}.{name}"] = ("F32", shape, chance.normal(size=shape).astype("<f4").tobytes())
    if levels:
        found["levels.width-20.neurons"] = ("I32", (LAYERS,), np.arange(LAYERS, dtype="<i4").clip(0, NEURONS).tobytes())
        found["levels.contextual-30.threshold"] = ("F32", (LAYERS,), np.linspace(0, 1, LAYERS, dtype="<f4").tobytes())
        for layer in range(LAYERS):
            found[f"neurons.{layer}.order"] = ("I32", (NEURONS,), fixed.permutation(NEURONS).astype("<i4").tobytes())
            found[f"neurons.{layer}.scale"] = ("F32", (NEURONS,), fixed.random(NEURONS).astype("<f4").tobytes())
            if layer % 2:
                bits = (fixed.normal(size=(NEURONS, HIDDEN)).astype("<f4").view("<u4") >> 16).astype("<u2")
                found[f"neurons.{layer}.repair"] = ("BF16", (NEURONS, HIDDEN), bits.tobytes())
    return found


def pack(tensors: Mapping[str, Tensor], metadata: object = None) -> bytes:
    """Write safetensors: the length of the header, the header, the tensors one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "sedac-probe-set/1"} if metadata is None else metadata}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    return pack_raw(json.dumps(header).encode(), b"".join(data for _, _, data in tensors.values()))


def pack_raw(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def make_fields(name: str = "fresh", layers: Sequence[int] = (2, 5, 8), *, rank: int = RANK, levels: bool = True) -> dict[str, Any]:
    """Return a good manifest, its digest left out."""
    fields: dict[str, Any] = {
        "name": name,
        "model": "tiny",
        "hidden_size": HIDDEN,
        "num_layers": LAYERS,
        "rank": rank,
        "target": "damage",
        "probes": [{"layer": layer, "threshold": 0.5, "metrics": {"spearman": 0.6}} for layer in layers],
        "training": {"num_documents": 3},
        "format": "sedac-probe-set/1",
    }
    if levels:
        fields |= {
            "intermediate_size": NEURONS,
            "activation": "silu",
            "score": "gate",
            "levels": [{"name": n, "reduction": r, "saved": 0.2, "perplexity_ratio": 1.01} for n, r in LEVELS],
            "tiers": [{"name": "balanced", "floor": "width-20", "level": "contextual-30"}],
        }
    return fields


@dataclasses.dataclass(frozen=True)
class MadeSet:
    """A probe set's two files."""

    manifest: bytes
    weights: bytes

    @property
    def fields(self) -> dict[str, Any]:
        return json.loads(self.manifest)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.weights).hexdigest()

    def with_weights(self, weights: bytes) -> MadeSet:
        """Return a set whose manifest states the digest of other weights, as a writer with a fault or a design would make it."""
        return MadeSet(json.dumps(self.fields | {"sha256": hashlib.sha256(weights).hexdigest()}).encode(), weights)

    def with_fields(self, **fields: Any) -> MadeSet:
        return MadeSet(json.dumps(self.fields | fields).encode(), self.weights)

    def write(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "manifest.json").write_bytes(self.manifest)
        (directory / "probes.safetensors").write_bytes(self.weights)
        return directory

    def make_header(self, **changes: Any) -> probe_sets_pb2.ProbeSetHeader:
        fields = self.fields
        stated = {"name": fields["name"], "size_bytes": len(self.weights), "sha256": fields["sha256"], "format": fields["format"]}
        return probe_sets_pb2.ProbeSetHeader(**({"manifest": self.manifest} | stated | changes))

    def make_parts(self, chunk_bytes: int = 1000, **changes: Any) -> Iterator[probe_sets_pb2.UploadProbeSetRequest]:
        yield probe_sets_pb2.UploadProbeSetRequest(header=self.make_header(**changes))
        for at in range(0, len(self.weights), chunk_bytes):
            yield probe_sets_pb2.UploadProbeSetRequest(chunk=self.weights[at : at + chunk_bytes])


def make_set(
    name: str = "fresh",
    layers: Sequence[int] = (2, 5, 8),
    *,
    rank: int = RANK,
    levels: bool = True,
    seed: int = 0,
    changes: Mapping[str, Any] | None = None,
) -> MadeSet:
    """Return a good set; `changes` replaces tensors by name (None: leaves one out)."""
    tensors = make_tensors(layers, rank=rank, levels=levels, seed=seed) | dict(changes or {})
    fields = make_fields(name, layers, rank=rank, levels=levels)
    return MadeSet(json.dumps(fields).encode(), b"").with_weights(pack({n: t for n, t in tensors.items() if t is not None}))
