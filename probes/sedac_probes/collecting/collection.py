"""The collection: a directory of safetensors shards and collection.json, that `collect` writes and every later command reads.

A shard holds `document` and `position` (N,) int64, `stream.<layer>` (N, D) fp32, `entropy` (N,) in nats, and, where the engine recorded it,
`top_logprob` and `top_token` (N, K), `next_logprob` (N,) of the text's own next token (NaN where the engine saw none), and by layer
`statistics.up.<layer>` and `statistics.hidden.<layer>` (F,), float64 sums over the shard's tokens of abs(up) and abs(act(gate) * up).
A shard for distillation holds streams and `final` (N, D), the state that the lm_head reads, in bf16, `next_token` (N,) int32 and `is_own` (N,),
whether the model itself chose that token, in place of all that comes from logits and neurons.
Nothing in it is code; reading executes nothing. N tokens, D hidden size, K most likely tokens, F neurons.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from sedac.errors import ArtifactError, ConfigError
from torch import Tensor

if TYPE_CHECKING:
    from sedac_probes.calibration.neurons import Statistics

DESCRIPTION = "collection.json"
_AGAIN = "run `sedac-probes collect` again with the same settings, it resumes"


@dataclass(frozen=True, kw_only=True)
class Collection:
    """What a collection directory holds; written as collection.json."""

    model: str
    layers: tuple[int, ...]
    num_documents: int
    max_length: int
    """Limit of tokens per document."""
    hidden_size: int
    num_layers: int
    data_digest: str
    weights_sha256: str = ""
    """Digest of the model's weights. If empty, it is unknown."""
    top_k: int = 0
    """Number of most likely next tokens recorded with each token."""
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    num_shards: int = 0
    """Number of shards. 0 means as many as there are."""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON carries it."""
        made: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return made


def get_shard_path(directory: Path, number: int) -> Path:
    """Return where a shard lies."""
    return directory / f"shard-{number:05d}.safetensors"


def write_description(directory: Path, described: Collection) -> None:
    """Write collection.json, or find that the directory holds the same one already.

    Raises:
        ConfigError: it holds a collection made with other settings, or the disk refuses.
    """
    path = directory / DESCRIPTION
    if path.exists():
        check_same(directory, described)
        return
    with _written_whole(path) as temporary:
        directory.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(described.to_json(), indent=2) + "\n")


def check_same(directory: Path, wanted: Collection) -> None:
    """Refuse to mix collections: raise ConfigError that names what differs from the one in `directory`, if there is one."""
    if not (directory / DESCRIPTION).exists():
        return
    found, asked = read_description(directory), wanted.to_json()
    names = [f.name for f in fields(wanted)]
    differing = [f"{name} {found.get(name)!r}, asked for {asked[name]!r}" for name in names if found.get(name) != asked[name]]
    if differing:
        raise ConfigError(f"{directory} holds a collection made with other settings ({'; '.join(differing)}); name another directory or remove it")


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a shard whole: under a temporary name, then renamed.

    Raises:
        ConfigError: the disk refuses; nothing of the shard stays.
    """
    with _written_whole(path) as temporary:
        safetensors.torch.save_file({name: t.contiguous() for name, t in tensors.items()}, temporary)


@contextmanager
def _written_whole(path: Path) -> Iterator[Path]:
    temporary = path.with_suffix(".tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.rename(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ConfigError(f"{path} can't be written ({error}); free space or mend the directory, then run the same command: it resumes") from error


def is_whole(path: Path) -> bool:
    """Whether a shard is there and its size is what its header says."""
    try:
        with safetensors.safe_open(path, framework="pt") as shard:
            return not {"entropy", "final"}.isdisjoint(shard.keys())  # safe_open is no mapping
    except (OSError, SafetensorError):
        return False


def read_description(directory: Path) -> dict[str, Any]:
    """Read collection.json.

    Raises:
        ConfigError: there is none, or it is broken.
    """
    path = directory / DESCRIPTION
    if not path.is_file():
        raise ConfigError(f"{path} is missing; run `sedac-probes collect` first")
    try:
        described = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read ({error}); remove {directory} and collect again") from error
    if not isinstance(described, dict) or not {"model", "layers", "hidden_size", "num_layers"} <= described.keys():
        raise ConfigError(f"{path} describes no collection; remove {directory} and collect again")
    return described


def read_collection(directory: Path, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (stream (N, D) fp32, log1p entropy (N,), document (N,)) of one layer over all shards.

    Raises:
        ConfigError: the collection has no shards, lacks some or the layer, is of several models, or holds NaN or infinity.
        ArtifactError: a shard is cut short or is no safetensors file.
    """
    streams: list[Tensor] = []
    targets: list[Tensor] = []
    documents: list[Tensor] = []
    name = f"stream.{layer}"
    for path, shard in read_shards(directory):
        if name not in shard:
            raise ConfigError(f"{path} has no stream of layer {layer}; collect again with --layers naming it")
        if missing := {"entropy", "document"} - set(shard):
            raise ArtifactError(f"{path} has no {' and no '.join(sorted(missing))}; remove it and {_AGAIN}")
        stream_ND, entropy_N = shard[name](), shard["entropy"]()
        if stream_ND.ndim != 2 or stream_ND.shape[0] != len(entropy_N):
            raise ArtifactError(f"{path}: {name} is {tuple(stream_ND.shape)}, expected ({len(entropy_N)}, hidden size); remove it and {_AGAIN}")
        if streams and stream_ND.shape[1] != streams[0].shape[1]:
            raise ConfigError(
                f"{path} has hidden size {stream_ND.shape[1]}, the shards before it {streams[0].shape[1]}; a collection is of one model: "
                f"remove the shards of the other and {_AGAIN}"
            )
        for what, values in ((name, stream_ND), ("entropy", entropy_N)):
            if num_bad := int((~values.isfinite()).sum()):
                raise ConfigError(f"{path}: {what} holds {num_bad} NaN or infinite values; check the model's dtype, remove the shard and {_AGAIN}")
        streams.append(stream_ND.float())
        targets.append(entropy_N.float().log1p())
        documents.append(shard["document"]())
    stream_ND = torch.cat(streams)
    if (directory / DESCRIPTION).is_file() and (wanted := read_description(directory)["hidden_size"]) != stream_ND.shape[1]:
        raise ConfigError(f"{directory} is described as of hidden size {wanted}, its shards have {stream_ND.shape[1]}; collect again from one model")
    return stream_ND, torch.cat(targets), torch.cat(documents)


def read_statistics(directory: Path) -> Statistics:
    """Return the neurons' statistics that the engine recorded, summed over all shards, by layer.

    Raises:
        ConfigError: the collection has none, for some layers or at all.
        ArtifactError: a shard is cut short or is no safetensors file.
    """
    from sedac_probes.calibration.neurons import Statistics

    described = read_description(directory)
    sums: dict[str, dict[int, Tensor]] = {"up": {}, "hidden": {}}
    num_tokens = 0
    for path, shard in read_shards(directory):
        num_tokens += len(shard["document"]())
        found = [layer for layer in range(described["num_layers"]) if f"statistics.up.{layer}" in shard and f"statistics.hidden.{layer}" in shard]
        if len(found) < described["num_layers"]:
            missing = sorted(set(range(described["num_layers"])) - set(found))
            raise ConfigError(
                f"{path} has no neuron statistics of layers {missing} (of MLPs without gate, up and down projection there are none); "
                "leave --collection out, or collect again from a model that has them"
            )
        for kind, totals in sums.items():
            for layer in found:
                part_F = shard[f"statistics.{kind}.{layer}"]()
                if layer in totals and totals[layer].shape != part_F.shape:
                    raise ConfigError(f"{path} has {len(part_F)} neurons in layer {layer}, the shards before it {len(totals[layer])}; collect again")
                if not part_F.isfinite().all():
                    raise ConfigError(f"{path}: statistics of layer {layer} hold NaN or infinity; check the model's dtype and collect again")
                totals[layer] = totals[layer] + part_F if layer in totals else part_F
    return Statistics(up=sums["up"], hidden=sums["hidden"], num_tokens=num_tokens)


def read_shards(directory: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield each shard's path and, by name, how to load a tensor of it."""
    paths = sorted(directory.glob("shard-*.safetensors"))
    if not paths:
        raise ConfigError(f"no shards in {directory}; run `sedac-probes collect` first")
    wanted = read_description(directory).get("num_shards", 0) if (directory / DESCRIPTION).is_file() else 0
    if wanted and wanted != len(paths):
        raise ConfigError(f"{directory} has {len(paths)} of {wanted} shards; {_AGAIN}")
    for path in paths:
        try:
            with safetensors.safe_open(path, framework="pt") as shard:
                yield path, {name: _Load(shard, name) for name in shard.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{path} can't be read as safetensors ({error}): it is cut short or no shard; remove it and {_AGAIN}") from error


@dataclass(frozen=True)
class _Load:
    """Loads one tensor of an open shard."""

    shard: Any
    name: str

    def __call__(self) -> Tensor:
        tensor: Tensor = self.shard.get_tensor(self.name)
        return tensor
