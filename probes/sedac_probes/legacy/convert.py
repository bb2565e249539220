"""Convert between the earlier versions' layout (`legacy`) and ours: probes <-> probe set, recorded streams <-> collection.

Everything is read and checked before anything is written, and a directory appears whole or not at all. Probes and streams come back bit
for bit. What the earlier versions never kept (metrics, levels, tiers, document bounds) is not invented.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from sedac.errors import ArtifactError, ConfigError, SedacError
from sedac.probe import artifact
from sedac.probe.manifest import Manifest, ProbeRecord
from torch import Tensor

from sedac_probes.collecting.collect import Collection
from sedac_probes.legacy import layout as legacy

Part = Literal["probes", "streams"]
TARGET = "final entropy, as trained by an earlier version"
ROWS_PER_DOCUMENT = 512
"""Where the source has no document bounds, rows in order are cut after so many, so that training still holds out whole stretches."""
_ROWS_PER_SHARD = 16 * ROWS_PER_DOCUMENT
_SUPPOSED_BOUNDS = f"no {legacy.DOCUMENTS}: every {ROWS_PER_DOCUMENT} rows are taken for one document"


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What was written."""

    kind: str
    """One of probe set, collection, earlier probes and earlier streams."""
    layers: tuple[int, ...]
    sha256: str
    """Digest of the probe set, or of the data that the streams are from."""
    notes: tuple[str, ...] = ()
    """What the operator must know."""


def convert(
    source: Path, out: Path, *, model: str = "", layers: tuple[int, ...] = (), thresholds: Mapping[int, float] | None = None, name: str = "converted",
    part: Part | None = None,
) -> Converted:  # fmt: skip
    """Convert `source` into the new directory `out`; the direction follows from what `source` holds.

    `part` says which, where a directory of the earlier layout holds probes and streams.

    Raises:
        ConfigError: the source has nothing to convert, `out` exists, or an option is missing or doesn't fit.
        ArtifactError: a file is broken, or made for another model.
    """
    if not source.is_dir():
        raise ConfigError(f"{source} is no directory; name the one with {legacy.PROBES.format('N')}, {legacy.STREAMS.format('N')} or a probe set")
    if (source / "manifest.json").is_file():
        return _to_earlier_probes(source, out, layers)
    if (source / "collection.json").is_file():
        return _to_earlier_streams(source, out, layers)
    found = {"probes": legacy.PROBES, "streams": legacy.STREAMS}
    held = [kind for kind, pattern in found.items() if any(source.glob(pattern.format("*")))]
    if not held or (part and part not in held):
        raise ConfigError(f"{source} has no {' or '.join(pattern.format('N') for kind, pattern in found.items() if part in (None, kind))} files")
    if len(held) > 1 and part is None:
        raise ConfigError(f"{source} holds probes and streams; say --part probes or --part streams")
    if not model:
        raise ConfigError("the earlier files don't say what model they are for; name it with --model DIR")
    if (part or held[0]) == "probes":
        return _to_probe_set(source, out, model, layers, dict(thresholds or {}), name)
    return _to_collection(source, out, model, layers)


def _read_shape(model: str) -> tuple[int, int]:
    """Return a model's depth and hidden size."""
    path = Path(model) / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text())
        config = config.get("text_config", config)
        return int(config["num_hidden_layers"]), int(config["hidden_size"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} can't be read as a model's config ({error}); name the model's directory with --model") from error


def _check_fit(path: Path, layer: int, hidden_size: int, model: str, shape: tuple[int, int]) -> None:
    if layer >= shape[0]:
        raise ArtifactError(f"{path} is of layer {layer}, {model} has layers 0 to {shape[0] - 1}; name the model that it was made with")
    if hidden_size != shape[1]:
        raise ArtifactError(f"{path} is for hidden size {hidden_size}, {model} has {shape[1]}; name the model that it was made with")


@contextmanager
def _new_directory(out: Path) -> Iterator[Path]:
    """Yield a directory beside `out` that becomes `out` where all went well, and is removed otherwise."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists; name another directory or remove it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise ConfigError(f"{out} can't be made: {error}") from error
    try:
        temporary.chmod(0o755)
        yield temporary
        temporary.replace(out)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # RuntimeError: torch's, when the disk is full
        raise ConfigError(f"{out} can't be written ({error}); nothing was kept: free space, or name another directory") from error
    except SedacError as error:
        raise type(error)(str(error).replace(str(temporary), str(out))) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _to_probe_set(source: Path, out: Path, model: str, layers: tuple[int, ...], given: dict[int, float], name: str) -> Converted:
    paths, shape = legacy.find_layers(source, legacy.PROBES, layers), _read_shape(model)
    if unknown := sorted(set(given) - set(paths)):
        raise ConfigError(f"--threshold names layers {unknown}, the probes are of {list(paths)}")
    probes = {layer: legacy.read_probe(path) for layer, path in paths.items()}
    for layer, probe in probes.items():
        _check_fit(paths[layer], layer, probe.down.in_features, model, shape)
    ranks = {layer: probe.down.out_features for layer, probe in probes.items()}
    if len(set(ranks.values())) > 1:
        raise ArtifactError(f"{source} has probes of ranks {ranks}, a probe set has one rank; convert those of one rank with --layers")
    thresholds = legacy.read_thresholds(source, tuple(paths)) | given
    off = [layer for layer in paths if layer not in thresholds]
    if not all(0 <= t < float("inf") for t in thresholds.values()):
        raise ConfigError(f"--threshold {thresholds}: a threshold is finite and at least 0")
    manifest = Manifest(
        name=name,
        model=Path(model).resolve().name,
        hidden_size=shape[1],
        num_layers=shape[0],
        rank=next(iter(ranks.values())),
        target=TARGET,
        probes=tuple(ProbeRecord(layer=layer, threshold=thresholds.get(layer, 0.0)) for layer in paths),
        training={"converted_from": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths.values()}},
    )
    with _new_directory(out) as temporary:
        sha256 = artifact.save(temporary, manifest, probes).sha256
        artifact.load(temporary)
    note = f"no threshold is known for layers {off}: they are 0, which lets no token go; set them with --threshold or `sedac-probes calibrate`"
    return Converted(kind="probe set", layers=tuple(paths), sha256=sha256, notes=(note,) if off else ())


def _to_earlier_probes(source: Path, out: Path, layers: tuple[int, ...]) -> Converted:
    found = artifact.load(source, tuple(sorted(set(layers))) or None)
    with _new_directory(out) as temporary:
        for layer, probe in found.probes.items():
            state = probe.state_dict()
            named = {"proj.weight": "down.weight", "norm.weight": "norm.weight", "norm.bias": "norm.bias", "head.weight": "out.weight"}
            torch.save({new: state[ours] for new, ours in (named | {"head.bias": "out.bias"}).items()}, temporary / legacy.PROBES.format(layer))
        thresholds = {str(p.layer): p.threshold for p in found.manifest.probes if p.layer in found.probes}
        (temporary / legacy.THRESHOLDS).write_text(json.dumps({legacy.THRESHOLDS_KEY: thresholds}, indent=2) + "\n")
    notes = ("levels and tiers stay behind: the earlier layout has no place for them",) if found.levels else ()
    return Converted(kind="earlier probes", layers=tuple(found.probes), sha256=found.manifest.sha256, notes=notes)


def _to_collection(source: Path, out: Path, model: str, layers: tuple[int, ...]) -> Converted:
    paths, shape = legacy.find_layers(source, legacy.STREAMS, layers), _read_shape(model)
    streams: dict[int, Tensor] = {}
    entropy_N = torch.empty(0)
    for layer, path in paths.items():
        streams[layer], found_N = legacy.read_states(source, path, layer)
        _check_fit(path, layer, streams[layer].shape[1], model, shape)
        first = next(iter(paths))
        if layer == first:
            entropy_N = found_N.float()
        elif len(found_N) != len(entropy_N):
            raise ArtifactError(f"{path} has {len(found_N)} tokens, layer {first} has {len(entropy_N)}; convert them apart with --layers")
        elif not torch.equal(found_N.float(), entropy_N):
            raise ArtifactError(f"{path} has other entropies than layer {first}, a collection has one per token; convert them apart with --layers")
    row_N = torch.arange(len(entropy_N))
    bounds = {"document": row_N // ROWS_PER_DOCUMENT, "position": row_N % ROWS_PER_DOCUMENT}
    notes: tuple[str, ...] = (_SUPPOSED_BOUNDS,)
    if (source / legacy.DOCUMENTS).is_file():
        bounds, notes = _check_bounds(source / legacy.DOCUMENTS, len(entropy_N)), ()
    tensors = {**bounds, "entropy": entropy_N, **{f"stream.{layer}": t for layer, t in streams.items()}}
    digest = _digest(tensors)
    described = Collection(
        model=model, layers=tuple(paths), num_documents=len(bounds["document"].unique()), max_length=int(bounds["position"].max()) + 1,
        hidden_size=shape[1], num_layers=shape[0], data_digest=digest,
    )  # fmt: skip
    with _new_directory(out) as temporary:
        for number, start in enumerate(range(0, len(entropy_N), _ROWS_PER_SHARD)):
            shard = {key: t[start : start + _ROWS_PER_SHARD].contiguous() for key, t in tensors.items()}
            safetensors.torch.save_file(shard, temporary / f"shard-{number:05d}.safetensors")
        (temporary / "collection.json").write_text(json.dumps(asdict(described), indent=2) + "\n")
    return Converted(kind="collection", layers=tuple(paths), sha256=digest, notes=notes)


def _check_bounds(path: Path, num_rows: int) -> dict[str, Tensor]:
    data = legacy.read_pickle(path)
    bounds = {key: data.get(key) for key in ("document", "position")} if isinstance(data, Mapping) else {}
    good = {key: t for key, t in bounds.items() if isinstance(t, Tensor) and t.shape == (num_rows,) and t.dtype == torch.int64 and (t >= 0).all()}
    if len(good) != 2:
        raise ArtifactError(f"{path} does not give document and position of {num_rows} rows as int64; remove it to have stretches of rows instead")
    return good


def _digest(tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for key, tensor in tensors.items():
        total.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        for piece in tensor.split(_ROWS_PER_SHARD):
            total.update(piece.contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()


def _to_earlier_streams(source: Path, out: Path, layers: tuple[int, ...]) -> Converted:
    paths = sorted(source.glob("shard-*.safetensors"))
    try:
        described = json.loads((source / "collection.json").read_text())
        held, num_shards = tuple(int(layer) for layer in described["layers"]), int(described.get("num_shards", 0))
        names = [set(_read_names(path)) for path in paths]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        raise ArtifactError(f"{source} can't be read as a collection ({error}); run `sedac-probes collect` again, it resumes") from error
    wanted = tuple(sorted(set(layers))) or held
    if missing := sorted(set(wanted) - set(held)):
        raise ConfigError(f"--layers names {missing}, {source} has layers {list(held)}")
    rows = ("document", "position", "entropy")
    needed = {*rows, *(f"stream.{layer}" for layer in wanted)}
    if not paths or (num_shards and len(paths) != num_shards) or not all(needed <= found for found in names):
        lack = f"{len(paths)} of {num_shards or 'its'} shards, or some lack one of {sorted(needed)}"
        raise ArtifactError(f"{source} has {lack}; run `sedac-probes collect` again, it resumes")
    document_N, position_N, entropy_N = (_read_column(paths, key) for key in rows)
    legacy.check_tensor(source, "entropy", entropy_N)
    with _new_directory(out) as temporary:
        for layer in wanted:  # one at a time: streams are large
            stream_ND = legacy.check_tensor(source, f"stream.{layer}", _read_column(paths, f"stream.{layer}"))
            torch.save(stream_ND, temporary / legacy.STREAMS.format(layer))
            torch.save(entropy_N, temporary / legacy.ENTROPIES.format(layer))
        torch.save({"document": document_N.long(), "position": position_N.long()}, temporary / legacy.DOCUMENTS)
    left = sorted({name.split(".")[0] for found in names for name in found - set(rows) if not name.startswith("stream.")})
    notes = (f"{', '.join(left)} stay behind: the earlier layout has no place for them",) if left else ()
    return Converted(kind="earlier streams", layers=wanted, sha256=str(described.get("data_digest", "")), notes=notes)


def _read_names(path: Path) -> list[str]:
    with safetensors.safe_open(path, framework="pt") as shard:
        return list(shard.keys())


def _read_column(paths: list[Path], key: str) -> Tensor:
    """Return one tensor of all shards, row after row."""
    parts = []
    for path in paths:
        with safetensors.safe_open(path, framework="pt") as shard:
            parts.append(shard.get_tensor(key))
    return torch.cat(parts)
