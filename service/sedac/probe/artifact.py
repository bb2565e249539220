"""The probe set: a directory with manifest.json and probes.safetensors, addressed by name and sha256.

Written by the workshop, read by the engine. Nothing in it is code; loading executes nothing. A set is refused whole when
anything about it is wrong.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from sedac.errors import ArtifactError
from sedac.probe.levels import Level, Neurons
from sedac.probe.manifest import FORMAT, Manifest, read_manifest
from sedac.probe.probe import LREProbe

WEIGHTS = "probes.safetensors"
_PARAMETERS = {"width": ("neurons", torch.int32), "contextual": ("threshold", torch.float32)}


@dataclass(frozen=True, kw_only=True)
class ProbeSet:
    """A manifest, its probes by layer and its reduced levels, on the CPU."""

    manifest: Manifest
    probes: dict[int, LREProbe]
    levels: tuple[Level, ...] = ()
    """in the manifest's order"""
    neurons: dict[int, Neurons] = field(default_factory=dict)
    """of every layer, where the set has levels"""


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
        tensors[f"levels.{level.name}.{_PARAMETERS[level.reduction][0]}"] = level.parameters_L.to(_PARAMETERS[level.reduction][1]).contiguous()
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
    levels, neurons = _load_levels(path, manifest, tensors)
    return ProbeSet(manifest=manifest, probes=probes, levels=levels, neurons=neurons)


def _load_levels(path: Path, manifest: Manifest, tensors: dict[str, Tensor]) -> tuple[tuple[Level, ...], dict[int, Neurons]]:
    """Take levels and neurons out of the tensors; refuses anything that is not exactly what the manifest says."""
    size = manifest.intermediate_size
    if not manifest.levels:
        return (), {}

    def take(name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        tensor = tensors.get(name)
        if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != dtype:
            found = "no tensor" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ArtifactError(f"{path}: {name} is {found}, expected {dtype} {shape}; calibrate the set again")
        return tensor

    def refuse(name: str, problem: str) -> ArtifactError:
        return ArtifactError(f"{path}: {name} {problem}; calibrate the set again")

    levels, neurons = [], {}
    for record in manifest.levels:
        part, dtype = _PARAMETERS[record.reduction]
        name = f"levels.{record.name}.{part}"
        parameters_L = take(name, dtype, manifest.num_layers)
        if record.reduction == "width" and not ((parameters_L >= 0) & (parameters_L <= size)).all():
            raise refuse(name, f"has counts outside 0..{size}")
        if record.reduction == "contextual" and not (parameters_L >= 0).all():
            raise refuse(name, "has thresholds below 0 or NaN")
        levels.append(Level(name=record.name, reduction=record.reduction, parameters_L=parameters_L))  # type: ignore[arg-type]
    for layer in range(manifest.num_layers):
        order_F = take(f"neurons.{layer}.order", torch.int32, size)
        if not torch.equal(order_F.sort().values, torch.arange(size, dtype=torch.int32)):
            raise refuse(f"neurons.{layer}.order", f"is no permutation of 0..{size - 1}")
        scale_F = take(f"neurons.{layer}.scale", torch.float32, size)
        if not (scale_F.isfinite() & (scale_F >= 0)).all():
            raise refuse(f"neurons.{layer}.scale", "holds NaN, infinity or a negative number")
        repair_FD = None
        if f"neurons.{layer}.repair" in tensors:
            repair_FD = take(f"neurons.{layer}.repair", torch.bfloat16, size, manifest.hidden_size)
            if not repair_FD.isfinite().all():
                raise refuse(f"neurons.{layer}.repair", "holds NaN or infinity")
        neurons[layer] = Neurons(order_F=order_F, scale_F=scale_F, repair_FD=repair_FD)
    return tuple(levels), neurons
