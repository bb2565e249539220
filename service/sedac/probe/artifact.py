"""The probe set: a directory with manifest.json and probes.safetensors, addressed by name and sha256.

Written by the workshop, read by the engine. Nothing in it is code; loading executes nothing. A set is refused whole when
anything about it is wrong.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType

import safetensors.torch
import torch
from safetensors import SafetensorError

from sedac.errors import ArtifactError
from sedac.probe.levels import Level, Neurons
from sedac.probe.manifest import FORMAT, Manifest, read_manifest
from sedac.probe.probe import LREProbe
from sedac.probe.verify import PARAMETERS, WEIGHTS, verify_weights

_DTYPES = {"width": torch.int32, "contextual": torch.float32}


@dataclass(frozen=True, kw_only=True)
class ProbeSet:
    """A manifest, its probes by layer and its reduced levels, on the CPU."""

    manifest: Manifest
    probes: dict[int, LREProbe]
    levels: tuple[Level, ...] = ()
    """Reduced levels, in the manifest's order."""
    neurons: dict[int, Neurons] = field(default_factory=dict)
    """Neurons of every layer, where the set has levels."""
    levels_sha256: str = ""
    """Digest of the reduced levels, see verify.py. If empty, there are none."""


def save(
    directory: Path,
    manifest: Manifest,
    probes: dict[int, LREProbe],
    *,
    levels: Sequence[Level] = (),
    neurons: Mapping[int, Neurons] = MappingProxyType({}),
) -> Manifest:
    """Write a probe set, weights first, and return its manifest with the digest filled in."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"{layer}.{name}": t.detach().float().contiguous() for layer, probe in probes.items() for name, t in probe.state_dict().items()}
    for level in levels:
        tensors[f"levels.{level.name}.{PARAMETERS[level.reduction]}"] = level.parameters_L.to(_DTYPES[level.reduction]).contiguous()
    for layer, known in neurons.items():
        tensors[f"neurons.{layer}.order"] = known.order_F.to(torch.int32).contiguous()
        tensors[f"neurons.{layer}.scale"] = known.scale_F.float().contiguous()
        if known.repair_FD is not None:
            tensors[f"neurons.{layer}.repair"] = known.repair_FD.to(torch.bfloat16).contiguous()
    data = safetensors.torch.save(tensors, metadata={"format": FORMAT})  # one key: several come in random order
    written = Manifest(**{**vars(manifest), "sha256": hashlib.sha256(data).hexdigest()})
    (directory / WEIGHTS).write_bytes(data)
    (directory / "manifest.json").write_text(json.dumps(asdict(written), indent=2) + "\n")
    return written


def load(directory: Path, layers: tuple[int, ...] | None = None) -> ProbeSet:
    """Read a probe set whole and verify it (verify.py); keep the probes of `layers` (default: all).

    Raises:
        ArtifactError: names the file, what was found and what was expected.
    """
    manifest = read_manifest(directory)
    path = directory / WEIGHTS
    try:
        data = path.read_bytes()
        levels_sha256 = verify_weights(manifest, io.BytesIO(data), str(path))
        tensors = safetensors.torch.load(data)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} can't be read ({error}); copy the probe set again") from error
    available = [p.layer for p in manifest.probes]
    probes = {}
    for layer in available if layers is None else layers:
        if layer not in available:
            raise ArtifactError(f"SEDAC probe missing for layer {layer}: {path} has layers {available}; train one or leave the layer out")
        names = [name.removeprefix(f"{layer}.") for name in tensors if name.startswith(f"{layer}.")]
        probes[layer] = LREProbe.from_tensors({name: tensors[f"{layer}.{name}"] for name in names})
    levels = tuple(
        Level(name=record.name, reduction=record.reduction, parameters_L=tensors[f"levels.{record.name}.{PARAMETERS[record.reduction]}"])  # type: ignore[arg-type]
        for record in manifest.levels
    )
    neurons = {
        layer: Neurons(
            order_F=tensors[f"neurons.{layer}.order"],
            scale_F=tensors[f"neurons.{layer}.scale"],
            repair_FD=tensors.get(f"neurons.{layer}.repair"),
        )
        for layer in range(manifest.num_layers if levels else 0)
    }
    return ProbeSet(manifest=manifest, probes=probes, levels=levels, neurons=neurons, levels_sha256=levels_sha256)
