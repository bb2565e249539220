"""The probe set: a directory with manifest.json and probes.safetensors, addressed by name and sha256.

Written by the workshop, read by the engine. Nothing in it is code; loading executes nothing. A set is refused whole when
anything about it is wrong.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from sedac.errors import ArtifactError
from sedac.probe.manifest import FORMAT, Manifest, read_manifest
from sedac.probe.probe import LREProbe

WEIGHTS = "probes.safetensors"


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
