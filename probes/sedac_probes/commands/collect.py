"""The command `collect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from sedac.errors import ConfigError

from sedac_probes.commands.options import DEMO, Layers, MaxLength, Model, Samples, Texts, parse_layers, read_documents


def collect(
    out: Annotated[Path, typer.Option(help="Directory for the shards; a collection that was stopped is resumed.")],
    model: Model = str(DEMO / "model"),
    texts: Texts = None,
    dataset: Annotated[str, typer.Option(help="Hugging Face dataset by name, beside --texts; needs the package datasets.")] = "",
    split: Annotated[str, typer.Option(help="Split of --dataset.")] = "train",
    field: Annotated[str, typer.Option(help="Field of --dataset with the text or the chat; default: as in .jsonl.")] = "",
    layers: Layers = "",
    suggest: Annotated[bool, typer.Option("--suggest", help="Choose the layers from the data: ridge probes at all layers on 24 documents.")] = False,
    samples: Samples = 320,
    max_length: MaxLength = 512,
    top_k: Annotated[int, typer.Option(help="Most likely next tokens to keep with each token.")] = 8,
    dtype: Annotated[str, typer.Option(help="auto (the model's own), float32, bfloat16 or float16; record in what will serve.")] = "auto",
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="Ranks, as in serving.")] = 1,
) -> None:
    """Record residual streams, final entropies, log-probabilities and what each neuron did, teacher-forced, on the engine that will serve.

    A file is a document; a line of a .jsonl file is one, with a field text, messages (a chat), or prompt and completion.

    Stopped at any time, the same command goes on where it was, and writes the same bytes.

    Examples:

        sedac-probes collect --out build/streams --samples 320

        sedac-probes collect --model build/model --texts traffic.jsonl --texts notes/ --suggest --out build/streams
    """
    from sedac_probes.collecting.collect import collect as run
    from sedac_probes.collecting.texts import DATASET

    chosen = parse_layers(layers)
    if (split != "train" or field) and not dataset:
        raise ConfigError("--split and --field belong to --dataset; name one")
    named = [*(texts or []), *([Path(f"{DATASET}{dataset}:{split}:{field}")] if dataset else [])]
    made = run(
        out, model, read_documents(named or None, "train", samples, model), layers=chosen, max_length=max_length, top_k=top_k, dtype=dtype,
        tensor_parallel_size=tensor_parallel_size, suggest=suggest,
    )  # fmt: skip
    typer.echo(f"{out}: {made.num_documents} documents, checkpoints after layers {', '.join(map(str, made.layers))} of {made.num_layers}")
