"""The probe set: a directory with manifest.json and probes.safetensors, addressed by name and sha256.

Written by the workshop, read by the engine and by `sedac doctor`. Nothing in it is code; loading executes nothing. A set
is refused whole when anything about it is wrong.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from sedac.errors import ArtifactError
from sedac.probe.probe import LREProbe

FORMAT = "sedac-probe-set/1"
WEIGHTS = "probes.safetensors"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class ProbeRecord:
    """One checkpoint of a set."""

    layer: int
    """decoder layer, 0-based"""
    threshold: float
    """the threshold that the set's author proposes"""
    metrics: dict[str, float] = field(default_factory=dict)
    """what training measured on held-out text"""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a probe set is and which model it fits."""

    name: str
    model: str
    hidden_size: int
    num_layers: int
    rank: int
    target: str
    """what risk predicts, for example `log1p(final entropy)`"""
    probes: tuple[ProbeRecord, ...]
    sha256: str = ""
    """of probes.safetensors"""
    training: dict[str, Any] = field(default_factory=dict)
    """data digest, number of tokens, hyper-parameters"""
    format: str = FORMAT


@dataclass(frozen=True, kw_only=True)
class ProbeSet:
    """A manifest and its probes by layer, on the CPU."""

    manifest: Manifest
    probes: dict[int, LREProbe]


def save(directory: Path, manifest: Manifest, probes: dict[int, LREProbe]) -> Manifest:
    """Write a probe set, weights first, and return its manifest with the digest filled in."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"{layer}.{name}": t.detach().float().contiguous() for layer, probe in probes.items() for name, t in probe.state_dict().items()}
    data = safetensors.torch.save(tensors, metadata={"format": FORMAT, "name": manifest.name})
    written = Manifest(**{**vars(manifest), "sha256": hashlib.sha256(data).hexdigest()})
    (directory / WEIGHTS).write_bytes(data)
    (directory / "manifest.json").write_text(json.dumps(asdict(written), indent=2) + "\n")
    return written


def read_manifest(directory: Path) -> Manifest:
    """Read and check manifest.json alone.

    Raises:
        ArtifactError: it is missing or malformed.
    """
    path = directory / "manifest.json"
    if not path.is_file():
        legacy = sorted(directory.glob("sedac_probe_layer*.pth")) if directory.is_dir() else []
        remedy = f"{legacy[0].name} and the like are pickles, which are never loaded here; train a probe set with `sedac-probes demo`" if legacy else (
            "point SEDAC_PROBE_DIR at a directory with manifest.json and probes.safetensors"
        )  # fmt: skip
        raise ArtifactError(f"SEDAC probe set missing: {path}; {remedy}")
    try:
        data = json.loads(path.read_text())
        manifest = Manifest(**{**data, "probes": tuple(ProbeRecord(**p) for p in data["probes"])})
        checks = {
            "format": manifest.format == FORMAT,
            "name": bool(_NAME.fullmatch(manifest.name)),
            "hidden_size": 0 < manifest.hidden_size <= 1 << 20,
            "rank": 0 < manifest.rank <= 4096,
            "num_layers": 0 < manifest.num_layers <= 4096,
            "probes": [p.layer for p in manifest.probes] == sorted({p.layer for p in manifest.probes}) and bool(manifest.probes),
            "probes.layer": all(0 <= p.layer < manifest.num_layers for p in manifest.probes),
            "probes.threshold": all(math.isfinite(p.threshold) and p.threshold >= 0 for p in manifest.probes),
        }
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{path} is not a probe set's manifest ({error}); write it with `sedac-probes`") from error
    for name, good in checks.items():
        if not good:
            raise ArtifactError(f"{path}: field {name} is out of range or of another format than {FORMAT}; write it with `sedac-probes`")
    return manifest


def load(directory: Path, layers: tuple[int, ...] | None = None) -> ProbeSet:
    """Read a probe set whole and verify its digest, shapes and values; keep the probes of `layers` (default: all).

    Raises:
        ArtifactError: names the file, what was found and what was expected.
    """
    manifest = read_manifest(directory)
    path = directory / WEIGHTS
    try:
        data = path.read_bytes()
        tensors = safetensors.torch.load(data)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} can't be read ({error}); copy the probe set again") from error
    found = hashlib.sha256(data).hexdigest()
    if found != manifest.sha256:
        raise ArtifactError(f"{path} has sha256 {found}, the manifest says {manifest.sha256}; copy the probe set again")
    available = [p.layer for p in manifest.probes]
    probes = {}
    for layer in available if layers is None else layers:
        if layer not in available:
            raise ArtifactError(f"SEDAC probe missing for layer {layer}: {path} has layers {available}; train one or leave the layer out")
        probe = LREProbe(manifest.hidden_size, manifest.rank)
        state = {name: tensors.get(f"{layer}.{name}") for name in probe.state_dict()}
        for name, expected in probe.state_dict().items():
            tensor = state[name]
            if tensor is None or tensor.shape != expected.shape or tensor.dtype != torch.float32:
                shape = "no tensor" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
                raise ArtifactError(f"{path}: {layer}.{name} is {shape}, expected float32 {tuple(expected.shape)}; train the probe again")
            if not tensor.isfinite().all():
                raise ArtifactError(f"{path}: {layer}.{name} holds NaN or infinity; train the probe again")
        probe.load_state_dict(state)
        probes[layer] = probe.eval().requires_grad_(False)
    return ProbeSet(manifest=manifest, probes=probes)
