"""The probe set's manifest, in plain Python: what a set is and which model it fits.

Read by the front end and by `sedac doctor`, which need no torch; the weights beside it are artifact.py's.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sedac.errors import ArtifactError

FORMAT = "sedac-probe-set/1"
MAX_MANIFEST_BYTES = 512 * 1024
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
_MAX_LEVELS = 14  # the engine has room for 16, `full` and `skip` included
_MAX_TIERS = 31
_MAX_DEPTH, _MAX_CHARS = 32, 1024
_NAME, _SHA256 = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}"), re.compile("[0-9a-f]{64}")
_NAME_LIMIT = "use 1 to 64 of a-z, 0-9, ., - and _, beginning with a letter or digit"
_REMEDY = "write it with `sedac-probes`"


@dataclass(frozen=True, kw_only=True)
class ProbeRecord:
    """One checkpoint of a set."""

    layer: int
    """Number of the decoder layer, 0-based."""
    threshold: float
    """The threshold that the set's author proposes."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What training measured on held-out text."""


@dataclass(frozen=True, kw_only=True)
class LevelRecord:
    """One reduced level of a set; its parameters per layer are in the weights."""

    name: str
    reduction: str
    """Either width or contextual."""
    saved: float
    """Share of all MLP FLOPs saved when every token takes it, on calibration text, 0 to 1."""
    perplexity_ratio: float
    """Ratio of the perplexity to the full model's, measured the same way."""
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
    """What risk predicts, for example `log1p(final entropy)`."""
    probes: tuple[ProbeRecord, ...]
    sha256: str = ""
    """Digest of probes.safetensors."""
    training: dict[str, Any] = field(default_factory=dict)
    """Data digest, number of tokens and hyper-parameters."""
    format: str = FORMAT
    intermediate_size: int = 0
    """Neurons of each MLP. 0 means that the set has no reduced levels."""
    activation: str = ""
    """Activation of the calibrated model's MLPs: silu, gelu or gelu_tanh."""
    score: str = "gate"
    """What a neuron's score is made from: gate (the projection's output) or activation."""
    levels: tuple[LevelRecord, ...] = ()
    """Reduced levels, in ascending order of saving."""
    tiers: tuple[TierRecord, ...] = ()


_RECORDS: dict[str, Any] = {"probes": ProbeRecord, "levels": LevelRecord, "tiers": TierRecord}


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
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise ArtifactError(f"{path} can't be read ({error}); copy the probe set again") from error
    return parse_manifest(data, str(path))


def parse_manifest(data: bytes, source: str) -> Manifest:
    """Check a manifest's bytes; `source` names them in errors. They may be anything: what comes over the wire is read by this too.

    Raises:
        ArtifactError: they are no manifest, or a field is out of range.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise ArtifactError(f"{source} has over {MAX_MANIFEST_BYTES} bytes, the most that is read; {_REMEDY}")
    try:
        fields = json.loads(data.decode("utf-8"), object_pairs_hook=refuse_duplicates)
        _check_texts(fields)
        parts = {name: tuple(kind(**part) for part in fields.get(name, ())) for name, kind in _RECORDS.items()}
        manifest = Manifest(**{**fields, **parts})
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{source} is not a probe set's manifest ({str(error)[:200]}); {_REMEDY}") from error
    fault = next(_find_faults(manifest), None)
    if fault:
        name, value, limit = fault
        raise ArtifactError(f"{source}: field {name} is out of range: {_show(value)}; {limit}, {_REMEDY}")
    return manifest


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON, as `object_pairs_hook`.

    Raises:
        ValueError: a key is there twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"key {ascii(counts.most_common(1)[0][0])[:80]} is there twice")
    return found


def _check_texts(fields: Any) -> None:
    """Refuse what is nested too deep to be copied, and text that no terminal and no message should carry."""
    level: list[Any] = [fields]
    for _ in range(_MAX_DEPTH):
        for value in level:
            if isinstance(value, str) and not (value.isprintable() and value.isascii()) and any(_is_control(c) for c in value):
                raise ValueError(f"{value[:80]!r} holds a control character or half of a surrogate pair")
        level = [
            part for value in level if isinstance(value, dict | list) for part in (value if isinstance(value, list) else [*value, *value.values()])
        ]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {_MAX_DEPTH} levels")


def _is_control(character: str) -> bool:
    return (ord(character) < 32 and character not in "\n\t") or 0x7F <= ord(character) < 0xA0 or 0xD800 <= ord(character) < 0xE000


def _find_faults(manifest: Manifest) -> Iterator[tuple[str, Any, str]]:
    """Yield the name, value and limit of fields that are out of range; the next is only safe to look for where there was none before."""
    for name, most in (("hidden_size", 1 << 20), ("num_layers", 4096), ("rank", 4096)):
        value = getattr(manifest, name)
        if not _is_integer(value, 1, most):
            yield name, value, f"give an integer from 1 to {most}"
    if manifest.format != FORMAT:
        yield "format", manifest.format, f"only {FORMAT} is known"
    if not _is_name(manifest.name):
        yield "name", manifest.name, _NAME_LIMIT
    for name in ("model", "target"):
        text = getattr(manifest, name)
        if not (isinstance(text, str) and len(text) <= _MAX_CHARS):
            yield name, text, f"give text of at most {_MAX_CHARS} characters"
    if not (isinstance(manifest.sha256, str) and _SHA256.fullmatch(manifest.sha256)):
        yield "sha256", manifest.sha256, "give 64 of 0-9 and a-f"
    if not isinstance(manifest.training, dict):
        yield "training", manifest.training, "give an object"
    last = manifest.num_layers - 1
    for i, probe in enumerate(manifest.probes):
        if not _is_integer(probe.layer, 0, last):
            yield "probes.layer", probe.layer, f"give a layer from 0 to {last}"
        if i and probe.layer <= manifest.probes[i - 1].layer:
            yield "probes", probe.layer, "give each layer once, in ascending order"
        if not _is_number(probe.threshold, 0):
            yield "probes.threshold", probe.threshold, "give a finite number >= 0"
        yield from _find_bad_metrics("probes", probe.metrics)
    if not manifest.probes:
        yield "probes", [], "give at least one"
    yield from _find_level_faults(manifest)
    yield from _find_tier_faults(manifest)


def _find_level_faults(manifest: Manifest) -> Iterator[tuple[str, Any, str]]:
    if not _is_integer(manifest.intermediate_size, 1 if manifest.levels else 0, 1 << 22):
        yield "intermediate_size", manifest.intermediate_size, f"give an integer up to {1 << 22}, over 0 where there are levels"
    if manifest.activation not in (_ACTIVATIONS if manifest.levels else ("", *_ACTIVATIONS)):
        yield "activation", manifest.activation, f"use {', '.join(_ACTIVATIONS)}"
    if manifest.score not in ("gate", "activation"):
        yield "score", manifest.score, "use gate or activation"
    if len(manifest.levels) > _MAX_LEVELS:
        yield "levels", len(manifest.levels), f"give at most {_MAX_LEVELS}"
    seen: set[str] = {"full", "skip"}
    for level in manifest.levels:
        if not _is_name(level.name) or level.name in seen:
            yield "levels.name", level.name, f"{_NAME_LIMIT}, each once, neither full nor skip"
        seen.add(level.name)
        if level.reduction not in ("width", "contextual"):
            yield "levels.reduction", level.reduction, "use width or contextual"
        if not _is_number(level.saved, 0, 1):
            yield "levels.saved", level.saved, "give a number from 0 to 1"
        if not _is_number(level.perplexity_ratio, 0) or level.perplexity_ratio == 0:
            yield "levels.perplexity_ratio", level.perplexity_ratio, "give a finite number over 0"
        yield from _find_bad_metrics("levels", level.metrics)


def _find_tier_faults(manifest: Manifest) -> Iterator[tuple[str, Any, str]]:
    floors = ["full", *(level.name for level in manifest.levels)]
    if len(manifest.tiers) > _MAX_TIERS:
        yield "tiers", len(manifest.tiers), f"give at most {_MAX_TIERS}"
    for tier in manifest.tiers:
        if not _is_name(tier.name):
            yield "tiers.name", tier.name, _NAME_LIMIT
        if tier.floor not in floors:
            yield "tiers.floor", tier.floor, f"the set has {', '.join(floors)}"
        if tier.level not in (*floors, "skip"):
            yield "tiers.level", tier.level, f"the set has {', '.join(floors)}, skip"
        if not _is_number(tier.threshold_scale, 0):
            yield "tiers.threshold_scale", tier.threshold_scale, "give a finite number >= 0"


def _find_bad_metrics(part: str, metrics: Any) -> Iterator[tuple[str, Any, str]]:
    """Yield what is no number; NaN is one here: what was measured is for people, nothing computes with it."""
    if not isinstance(metrics, dict):
        yield f"{part}.metrics", metrics, "give an object"
    for name, value in metrics.items():
        if not (value is None or (isinstance(value, int | float) and not isinstance(value, bool))):
            yield f"{part}.metrics", {name: value}, "give numbers"


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(_NAME.fullmatch(value))


def _is_integer(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: Any, least: float, most: float = sys.float_info.max) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _show(value: Any) -> str:
    text = ascii(value) if not isinstance(value, int) or abs(value) < 10**80 else "a number of over 80 digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
