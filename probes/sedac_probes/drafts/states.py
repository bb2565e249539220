"""What drafts learn from: streams after shallow layers and the final states of texts, recorded through the engine that will serve.

A text is cut into pieces of at most `max_length` tokens; of a share of the pieces only the first tokens are kept and the model goes on
by itself, greedily and at temperature 0.8 in turn, because a draft must foresee what the model says, not what people wrote.
Resumable as collect.py is: a shard is written whole and its pieces enter an idle engine together.
N tokens, D hidden size, B pieces of S positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sedac.errors import ConfigError
from sedac.policy.weights import get_weights_digest
from torch import Tensor
from tqdm import tqdm

from sedac_probes import corpus
from sedac_probes.collecting.collect import record
from sedac_probes.collecting.collection import (
    DESCRIPTION,
    Collection,
    check_same,
    get_shard_path,
    is_whole,
    read_description,
    read_shards,
    write_description,
    write_shard,
)
from sedac_probes.collecting.recording import LLM, read_config, start_engine

TEMPERATURE = 0.8
"""Temperature of every second piece that the model goes on with."""
_NUM_SEQUENCES = 64
"""Number of sequences that the engine serves at once."""
_LEAST_TOKENS = 32
"""Least tokens at the end of a text. Shorter ends are left out."""


@dataclass(frozen=True, kw_only=True)
class StateCollection(Collection):
    """A collection for distillation; `num_documents` counts pieces."""

    own_share: float
    """Share of the pieces that the model goes on with."""
    prompt_length: int
    """Tokens of such a piece that are the text's."""
    greedy: bool = False
    """Whether all of those are continued greedily."""
    final: bool = True


@dataclass(frozen=True, kw_only=True)
class States:
    """A collection in memory, of one depth; pieces lie one after the other."""

    stream_ND: Tensor
    """Streams after layer depth-1, bf16."""
    final_ND: Tensor
    """States that the lm_head reads, bf16."""
    next_N: Tensor
    """The token that follows, int64."""
    is_own_N: Tensor
    """Whether the model chose that token, bool."""
    starts: list[int]
    """First row of each piece, and the number of rows."""

    @property
    def num_pieces(self) -> int:
        """Pieces."""
        return len(self.starts) - 1


class Source:
    """The engine that records, started when it is first needed: a process has one."""

    def __init__(self, model: str, *, max_length: int = 512, dtype: str = "auto") -> None:
        """`max_length` bounds the pieces of all collections made with it."""
        self.model, self.max_length, self.dtype = model, max_length, dtype
        self.config = read_config(model)
        self._llm: LLM = None

    def get(self, layers: Sequence[int]) -> LLM:
        """Return the engine; it records after these layers from now on."""
        if self._llm is None:
            watched = tuple(range(self.config["num_hidden_layers"] - 1))
            self._llm = start_engine(
                self.model, layers=watched, max_length=self.max_length, dtype=self.dtype, keeps_final=True, num_sequences=_NUM_SEQUENCES
            )
        self._llm.collective_rpc("sedac_keep_streams", args=(list(layers),))
        return self._llm


def collect_states(
    out: Path,
    source: Source,
    documents: Sequence[corpus.Document],
    *,
    depths: Sequence[int],
    num_pieces: int,
    own_share: float,
    max_length: int = 512,
    prompt_length: int = 64,
    greedy: bool = False,
    pieces_per_shard: int = 64,
) -> None:
    """Record `num_pieces` pieces, spread evenly over the documents, under `out`; `depths` count layers from the first one on.

    A collection that `out` holds already may have more depths than are wanted.

    Raises:
        ConfigError: a value is out of range, the texts are too short, or `out` holds a collection made with other settings.
    """
    config, num_layers = source.config, source.config["num_hidden_layers"]
    if outside := sorted(depth for depth in depths if not 1 <= depth < num_layers):
        raise ConfigError(f"--layers names {outside}, outside 1..{num_layers - 1} (the model has {num_layers} layers; a draft runs the first ones)")
    limit = min(source.max_length, config.get("max_position_embeddings") or max_length)
    if not prompt_length + 2 <= max_length <= limit:
        raise ConfigError(f"--max-length is {max_length}; give {prompt_length + 2} to {limit}, the length that the model takes")
    if not 0 <= own_share <= 1:
        raise ConfigError(f"--own-share is {own_share}; give 0 to 1")
    layers = {depth - 1 for depth in depths}
    if (out / DESCRIPTION).exists() and layers <= (found := set(read_description(out)["layers"])):
        layers = found
    wanted = StateCollection(
        model=source.model, layers=tuple(sorted(layers)), num_documents=num_pieces, max_length=max_length, hidden_size=config["hidden_size"],
        num_layers=num_layers, data_digest=corpus.digest(list(documents)), weights_sha256=get_weights_digest(source.model), dtype=source.dtype,
        num_shards=-(-num_pieces // pieces_per_shard), own_share=own_share, prompt_length=prompt_length, greedy=greedy,
    )  # fmt: skip
    check_same(out, wanted)
    missing = [i for i in range(wanted.num_shards) if not is_whole(get_shard_path(out, i))]
    if not missing:
        return
    llm = source.get(wanted.layers)
    pieces = cut(llm.get_tokenizer(), documents, wanted)
    params = [_make_params(i, len(ids), wanted) for i, ids in enumerate(pieces)]
    write_description(out, wanted)
    for i in tqdm(missing, desc=f"collect {out.name}", unit="shard"):
        first = i * pieces_per_shard
        here = slice(first, first + pieces_per_shard)
        torch.manual_seed(i)  # a seed per request would fail where a prompt is cut: "CPU Generator does not use offset" (gpu_model_runner.py, 0.32)
        write_shard(get_shard_path(out, i), record(llm, pieces[here], first, params[here])[0])


def cut(tokenizer: Any, documents: Sequence[corpus.Document], wanted: StateCollection) -> list[list[int]]:
    """Return the pieces' prompts, spread evenly over all that the documents give.

    Raises:
        ConfigError: the documents are too short for that many.
    """
    size = wanted.max_length - 1
    pieces: list[list[int]] = []
    for document in documents:
        ids = tokenizer(document.text)["input_ids"]
        pieces += [ids[i : i + size] for i in range(0, len(ids), size) if len(ids) - i >= max(_LEAST_TOKENS, wanted.prompt_length)]
    if len(pieces) < wanted.num_documents:
        raise ConfigError(f"the texts give {len(pieces)} pieces of up to {size} tokens, --samples asks for {wanted.num_documents}; name more texts")
    chosen = [pieces[i * len(pieces) // wanted.num_documents] for i in range(wanted.num_documents)]
    return [ids[: wanted.prompt_length] if _is_own(i, wanted.own_share) else ids for i, ids in enumerate(chosen)]


def _is_own(number: int, share: float) -> bool:
    return int((number + 1) * share) > int(number * share)


def _make_params(number: int, num_tokens: int, wanted: StateCollection) -> Any:
    """Return how the model goes on with piece `number`."""
    from vllm import SamplingParams

    if not _is_own(number, wanted.own_share):
        return SamplingParams(max_tokens=1, temperature=0, detokenize=False)
    turn = int((number + 1) * wanted.own_share)
    temperature = TEMPERATURE if turn % 2 and not wanted.greedy else 0.0
    return SamplingParams(max_tokens=wanted.max_length - num_tokens, temperature=temperature, ignore_eos=True, detokenize=False)


def read_states(directory: Path, depth: int) -> States:
    """Read a collection for drafts that run the first `depth` layers.

    Raises:
        ConfigError: it was not made for distillation, lacks shards or the depth, or holds NaN or infinity.
    """
    parts: dict[str, list[Tensor]] = {}
    stream = f"stream.{depth - 1}"
    names = (stream, "final", "next_token", "is_own", "position")
    for path, shard in read_shards(directory):
        if missing := [name for name in names if name not in shard]:
            raise ConfigError(f"{path} has no {', '.join(missing)}; collect it again with `sedac-probes distill`, naming layer {depth}")
        for name in names:
            parts.setdefault(name, []).append(shard[name]())
        for name in (stream, "final"):
            if not parts[name][-1].isfinite().all():
                raise ConfigError(f"{path}: {name} holds NaN or infinity; check the model's dtype, remove the shard and run the same command")
    whole = {name: torch.cat(pieces) for name, pieces in parts.items()}
    starts = (whole["position"] == 0).nonzero()[:, 0].tolist()
    return States(
        stream_ND=whole[stream], final_ND=whole["final"], next_N=whole["next_token"].long(), is_own_N=whole["is_own"],
        starts=[*starts, len(whole["position"])],
    )  # fmt: skip


def pad(states: States, pieces: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the streams of some pieces (B, S, D), padded at the right, and which positions are real (B, S)."""
    bounds = [(states.starts[i], states.starts[i + 1]) for i in pieces]
    length = max(end - start for start, end in bounds)
    x_BSD = states.stream_ND.new_zeros(len(bounds), length, states.stream_ND.shape[1])
    real_BS = torch.zeros(len(bounds), length, dtype=torch.bool)
    for row, (start, end) in enumerate(bounds):
        x_BSD[row, : end - start], real_BS[row, : end - start] = states.stream_ND[start:end], True
    return x_BSD, real_BS


def get_rows(states: States, pieces: Sequence[int]) -> Tensor:
    """Return the numbers of the pieces' rows, in the order of `pad`'s real positions."""
    return torch.cat([torch.arange(states.starts[i], states.starts[i + 1]) for i in pieces])
