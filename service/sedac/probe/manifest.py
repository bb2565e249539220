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
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
_MAX_LEVELS = 14  # the engine has room for 16, `full` and `skip` included
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
class LevelRecord:
    """One reduced level of a set; its parameters per layer are in the weights."""

    name: str
    reduction: str
    """width or contextual"""
    saved: float
    """share of all MLP FLOPs, when every token takes it; on calibration text, 0 to 1"""
    perplexity_ratio: float
    """to the full model, the same way"""
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TierRecord:
    """A tier that the set's author proposes."""

    name: str
    floor: str
    level: str
    threshold_scale: float = 1.0


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
    intermediate_size: int = 0
    """neurons of each MLP; 0: the set has no reduced levels"""
    activation: str = ""
    """of the calibrated model's MLPs: silu, gelu or gelu_tanh"""
    score: str = "gate"
    """what a neuron's score is made from: gate (the projection's output) or activation"""
    levels: tuple[LevelRecord, ...] = ()
    """in ascending order of saving"""
    tiers: tuple[TierRecord, ...] = ()


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
        parts = {
            "probes": tuple(ProbeRecord(**p) for p in data["probes"]),
            "levels": tuple(LevelRecord(**p) for p in data.get("levels", ())),
            "tiers": tuple(TierRecord(**p) for p in data.get("tiers", ())),
        }
        manifest = Manifest(**{**data, **parts})
        level_names = [level.name for level in manifest.levels]
        checks = {
            "format": manifest.format == FORMAT,
            "name": bool(_NAME.fullmatch(manifest.name)),
            "hidden_size": 0 < manifest.hidden_size <= 1 << 20,
            "rank": 0 < manifest.rank <= 4096,
            "num_layers": 0 < manifest.num_layers <= 4096,
            "probes": [p.layer for p in manifest.probes] == sorted({p.layer for p in manifest.probes}) and bool(manifest.probes),
            "probes.layer": all(0 <= p.layer < manifest.num_layers for p in manifest.probes),
            "intermediate_size": 0 <= manifest.intermediate_size <= 1 << 22 and bool(manifest.intermediate_size) >= bool(manifest.levels),
            "activation": manifest.activation in (_ACTIVATIONS if manifest.levels else ("", *_ACTIVATIONS)),
            "score": manifest.score in ("gate", "activation"),
            "levels": len(level_names) <= _MAX_LEVELS,
            "levels.name": all(_NAME.fullmatch(n) for n in level_names) and len({"full", "skip", *level_names}) == 2 + len(level_names),
            "levels.reduction": all(level.reduction in ("width", "contextual") for level in manifest.levels),
            "levels.saved": all(0 <= level.saved <= 1 for level in manifest.levels),
            "levels.perplexity_ratio": all(math.isfinite(level.perplexity_ratio) and level.perplexity_ratio > 0 for level in manifest.levels),
            "tiers.floor": all(tier.floor in ("full", *level_names) for tier in manifest.tiers),
            "tiers.level": all(tier.level in ("full", "skip", *level_names) for tier in manifest.tiers),
            "tiers.threshold_scale": all(math.isfinite(t.threshold_scale) and t.threshold_scale >= 0 for t in manifest.tiers),
            "probes.threshold": all(math.isfinite(p.threshold) and p.threshold >= 0 for p in manifest.probes),
        }
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{path} is not a probe set's manifest ({error}); write it with `sedac-probes`") from error
    for name, good in checks.items():
        if not good:
            raise ArtifactError(f"{path}: field {name} is out of range or of another format than {FORMAT}; write it with `sedac-probes`")
    return manifest
