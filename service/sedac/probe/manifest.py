"""The probe set's manifest, in plain Python: what a set is and which model it fits.

Read by the front end and by `sedac doctor`, which need no torch; the weights beside it are artifact.py's.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sedac.errors import ArtifactError

FORMAT = "sedac-probe-set/1"
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


def read_manifest(directory: Path) -> Manifest:
    """Read and check manifest.json alone.

    Raises:
        ArtifactError: it is missing or malformed.
    """
    path = directory / "manifest.json"
    if not path.is_file():
        legacy = sorted(directory.glob("sedac_probe_layer*.pth")) if directory.is_dir() else []
        remedy = "point SEDAC_PROBE_DIR at a directory with manifest.json and probes.safetensors"
        if legacy:
            remedy = f"{legacy[0].name} and the like are pickles, which are never loaded here; train a probe set with `sedac-probes`"
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
