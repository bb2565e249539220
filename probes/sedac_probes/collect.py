"""Collect: run texts through the engine, teacher-forced, and write streams and final entropies as safetensors shards.

Resumable: a shard is written whole (temporary name, then renamed) and never again. N tokens, D hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from sedac.errors import ConfigError
from tqdm import tqdm

from sedac_probes import corpus
from sedac_probes.recording import LLM, start_engine, tokenise

_DOCUMENTS_PER_SHARD = 16
_FRACTIONS = (0.19, 0.41, 0.65)  # where the earlier versions put their checkpoints: 7, 14, 21 of 36 and 5, 12, 19 of 28


@dataclass(frozen=True, kw_only=True)
class Collection:
    """What a collection directory holds; written as collection.json."""

    model: str
    layers: tuple[int, ...]
    num_documents: int
    max_length: int
    """tokens per document at most"""
    hidden_size: int
    num_layers: int
    data_digest: str


def choose_layers(num_layers: int) -> tuple[int, ...]:
    """Return the default checkpoint layers for a model of that depth."""
    return tuple(sorted({max(0, round(num_layers * f)) for f in _FRACTIONS}))


def collect(out: Path, model: str, documents: Sequence[corpus.Document], *, layers: tuple[int, ...] = (), max_length: int = 512) -> Collection:
    """Write shard-NNNNN.safetensors under `out`: `stream.<layer>` (N, D), `entropy` (N,) nats, `document` and `position` (N,).

    Raises:
        ConfigError: no documents, or `out` holds a collection made with other settings.
    """
    if not documents:
        raise ConfigError("no documents to collect from; name texts of at least 200 characters")
    text_config = json.loads((Path(model) / "config.json").read_text())
    num_layers, hidden_size = text_config["num_hidden_layers"], text_config["hidden_size"]
    wanted = Collection(
        model=model,
        layers=layers or choose_layers(num_layers),
        num_documents=len(documents),
        max_length=max_length,
        hidden_size=hidden_size,
        num_layers=num_layers,
        data_digest=corpus.digest(list(documents)),
    )
    out.mkdir(parents=True, exist_ok=True)
    description = out / "collection.json"
    if description.exists() and json.loads(description.read_text()) != json.loads(json.dumps(asdict(wanted))):
        raise ConfigError(f"{out} holds a collection made with other settings; name another directory or remove it")
    description.write_text(json.dumps(asdict(wanted), indent=2) + "\n")
    groups = [documents[i : i + _DOCUMENTS_PER_SHARD] for i in range(0, len(documents), _DOCUMENTS_PER_SHARD)]
    missing = [i for i in range(len(groups)) if not (out / f"shard-{i:05d}.safetensors").exists()]
    if missing:
        llm = start_engine(model, layers=wanted.layers, max_length=max_length)
        for i in tqdm(missing, desc="collect", unit="shard"):
            _write_shard(llm, out / f"shard-{i:05d}.safetensors", groups[i], i * _DOCUMENTS_PER_SHARD, max_length)
    return wanted


def _write_shard(llm: LLM, path: Path, documents: Sequence[corpus.Document], first: int, max_length: int) -> None:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": ids} for ids in tokenise(llm, [d.text for d in documents], max_length)]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
    # The engine's request ids end in "-<suffix>" since 0.32; outputs carry the part before it, in the order of the prompts.
    numbers = {output.request_id: first + i for i, output in enumerate(outputs)}
    parts: dict[str, list[torch.Tensor]] = {}
    for (entries,) in [llm.collective_rpc("sedac_take_records")]:
        for entry in entries:
            for request_id, start, count in entry["requests"]:
                number = numbers[request_id if request_id in numbers else request_id.rpartition("-")[0]]
                parts.setdefault("document", []).append(torch.full((count,), number))
                parts.setdefault("position", []).append(torch.arange(start, start + count))
            parts.setdefault("entropy", []).append(entry["entropy"])
            for layer, stream in entry["streams"].items():
                parts.setdefault(f"stream.{layer}", []).append(stream)
    tensors = {name: torch.cat(pieces) for name, pieces in parts.items()}
    order = torch.argsort(tensors["document"] * 1_000_000 + tensors["position"])
    temporary = path.with_suffix(".tmp")
    safetensors.torch.save_file({name: t[order].contiguous() for name, t in tensors.items()}, temporary)
    temporary.rename(path)
