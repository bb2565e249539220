"""Collect: run texts through the engine, teacher-forced, and write what it computed as safetensors shards; see collection.py.

Resumable: a shard is written whole and never again, and nothing in it depends on what ran before it: a shard's documents enter an
idle engine together and leave it before the next shard's do. One shard is in memory at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sedac.errors import ConfigError
from sedac.policy.weights import get_weights_digest
from torch import Tensor
from tqdm import tqdm

from sedac_probes import corpus
from sedac_probes.collecting.collection import (
    DESCRIPTION,
    Collection,
    check_same,
    get_shard_path,
    is_whole,
    read_collection,
    read_description,
    read_statistics,
    write_description,
    write_shard,
)
from sedac_probes.collecting.recording import LLM, read_config, start_engine, tokenise

__all__ = ["Collection", "choose_layers", "collect", "read_collection", "read_statistics", "record"]

_log = logging.getLogger(__name__)
_DOCUMENTS_PER_SHARD = 16
_MAX_TOP_K = 1024
_EARLIER = {28: (5, 12, 19), 36: (7, 14, 21)}  # where the earlier versions put their checkpoints
_FRACTIONS = (0.19, 0.41, 0.65)  # about theirs, for other depths


def choose_layers(num_layers: int) -> tuple[int, ...]:
    """Return the default checkpoint layers for a model of that depth; none after the last layer, where nothing is left to decide."""
    return _EARLIER.get(num_layers) or tuple(sorted({max(0, min(round(num_layers * f), num_layers - 2)) for f in _FRACTIONS}))


def check_layers(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Return the layers in order.

    Raises:
        ConfigError: one is named twice, or no checkpoint can stand there.
    """
    if twice := sorted({layer for layer in layers if list(layers).count(layer) > 1}):
        raise ConfigError(f"--layers names {twice} more than once; name each layer once")
    if outside := sorted(layer for layer in layers if not 0 <= layer < num_layers - 1):
        raise ConfigError(
            f"--layers names {outside}, outside 0..{num_layers - 2} (the model has {num_layers} layers, 0-based, none decides after the last)"
        )
    return tuple(sorted(layers))


def collect(
    out: Path,
    model: str,
    documents: Sequence[corpus.Document],
    *,
    layers: tuple[int, ...] = (),
    max_length: int = 512,
    top_k: int = 8,
    dtype: str = "auto",
    tensor_parallel_size: int = 1,
    suggest: bool = False,
) -> Collection:
    """Write the shards under `out` and return what they are.

    `suggest` picks the layers from the first documents; a collection that is resumed keeps those that it was begun with.

    Raises:
        ConfigError: a value is out of range, the texts are too short, `out` holds a collection made with other settings, or the disk is full.
    """
    config = read_config(model)
    num_layers = config["num_hidden_layers"]
    _check(documents, max_length, top_k, config)
    if suggest and layers:
        raise ConfigError(f"--layers {list(layers)} and --suggest are two ways to choose the layers; give one")
    begun = suggest and (out / DESCRIPTION).exists()
    wanted = Collection(
        model=model,
        layers=tuple(read_description(out)["layers"]) if begun else check_layers(layers, num_layers) or choose_layers(num_layers),
        num_documents=len(documents),
        max_length=max_length,
        hidden_size=config["hidden_size"],
        num_layers=num_layers,
        data_digest=corpus.digest(list(documents)),
        weights_sha256=get_weights_digest(model),
        top_k=top_k,
        dtype=dtype,
        tensor_parallel_size=tensor_parallel_size,
        num_shards=-(-len(documents) // _DOCUMENTS_PER_SHARD),
    )
    if not suggest or begun:
        check_same(out, wanted)
    missing = [i for i in range(wanted.num_shards) if not is_whole(get_shard_path(out, i))]
    if not missing:
        return wanted
    chooses = suggest and not begun
    watched = tuple(range(num_layers - 1)) if chooses else wanted.layers
    llm = start_engine(model, layers=watched, max_length=max_length, dtype=dtype, top_k=top_k, tensor_parallel_size=tensor_parallel_size)
    prompts = _tokenise(llm, documents, max_length)
    if chooses:
        from sedac_probes.collecting.suggest import suggest_layers

        wanted = replace(wanted, layers=suggest_layers(lambda ids: record(llm, ids)[0], prompts, num_layers))
        llm.collective_rpc("sedac_keep_streams", args=(list(wanted.layers),))
    write_description(out, wanted)
    for i in tqdm(missing, desc="collect", unit="shard"):
        first = i * _DOCUMENTS_PER_SHARD
        tensors, left_out = record(llm, prompts[first : first + _DOCUMENTS_PER_SHARD], first)
        if left_out and i == missing[0]:
            _log.warning("no neuron statistics of layers %s: %s", sorted(left_out), "; ".join(sorted(set(left_out.values()))))
        write_shard(get_shard_path(out, i), tensors)
    return wanted


def _check(documents: Sequence[corpus.Document], max_length: int, top_k: int, config: dict[str, Any]) -> None:
    if not documents:
        raise ConfigError("no documents to collect from; name texts")
    limit = config.get("max_position_embeddings")
    if max_length < 3 or (limit and max_length > limit):
        raise ConfigError(f"--max-length is {max_length}; give 3 to {limit or 'the length that the model takes'}")
    most = min(_MAX_TOP_K, config["vocab_size"])
    if not 1 <= top_k <= most:
        raise ConfigError(f"--top-k is {top_k}; give 1 to {most}")


def _tokenise(llm: LLM, documents: Sequence[corpus.Document], max_length: int) -> list[list[int]]:
    prompts = tokenise(llm, [d.text for d in documents], max_length)
    if short := [d.path for d, ids in zip(documents, prompts, strict=True) if len(ids) < 2]:
        raise ConfigError(f"{short[0]} and {len(short) - 1} more texts have fewer than 2 tokens; a text must say what follows: leave them out")
    return prompts


def record(llm: LLM, prompts: Sequence[list[int]], first: int = 0, params: Any = None) -> tuple[dict[str, Tensor], dict[int, str]]:
    """Run token ids through a recording engine that is idle: (tensors of a shard, why layers have no statistics).

    Documents are numbered from `first`; rows are ordered by document and position. `params`, vLLM's, of each prompt or all, say how the
    model goes on; what it adds is recorded too, but for the last token.
    """
    from vllm import SamplingParams

    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params or SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
    # The engine's request ids end in "-<suffix>" since 0.32; outputs carry the part before it, in the order of the prompts.
    numbers = {output.request_id: first + i for i, output in enumerate(outputs)}
    parts: dict[str, list[Tensor]] = {}
    for entry in llm.collective_rpc("sedac_take_records")[0]:  # every rank has the same streams, the first one has the logits
        for request_id, start, count in entry.pop("requests"):
            number = numbers[request_id if request_id in numbers else request_id.rpartition("-")[0]]
            parts.setdefault("document", []).append(torch.full((count,), number))
            parts.setdefault("position", []).append(torch.arange(start, start + count))
        for layer, stream in entry.pop("streams").items():
            parts.setdefault(f"stream.{layer}", []).append(stream)
        for name, values in entry.items():
            parts.setdefault(name, []).append(values)
    tensors = {name: torch.cat(pieces).cpu() for name, pieces in parts.items()}
    order = torch.argsort(tensors["document"] * 1_000_000 + tensors["position"])
    shard = {name: t[order] for name, t in tensors.items()}
    if "final" in shard:
        shard |= _describe_own(prompts, [list(output.outputs[0].token_ids) for output in outputs])
    ranks = llm.collective_rpc("sedac_take_statistics")
    for kind in ("up", "hidden"):
        for layer in sorted(ranks[0][kind]):  # a rank has the neurons that follow those of the rank before
            shard[f"statistics.{kind}.{layer}"] = torch.cat([rank[kind][layer].cpu() for rank in ranks])
    return shard, ranks[0]["left_out"]


def _describe_own(prompts: Sequence[list[int]], added: Sequence[list[int]]) -> dict[str, Tensor]:
    """Return, for each recorded row, the token that follows and whether the model added it; the last one added has no row."""
    pairs = list(zip(prompts, added, strict=True))
    return {
        "next_token": torch.tensor([token for ids, own in pairs for token in (*ids[1:], *own)], dtype=torch.int32),
        "is_own": torch.tensor([i >= len(ids) - 1 for ids, own in pairs for i in range(len(ids) + len(own) - 1)]),
    }
