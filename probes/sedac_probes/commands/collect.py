"""The command `collect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sedac_probes.commands.options import DEMO, Layers, MaxLength, Model, Samples, Texts, read_documents


def collect(
    out: Annotated[Path, typer.Option(help="Directory for the shards; a collection that was stopped is resumed.")],
    model: Model = str(DEMO / "model"),
    texts: Texts = None,
    layers: Layers = "",
    samples: Samples = 320,
    max_length: MaxLength = 512,
) -> None:
    """Record residual streams and final entropies, teacher-forced, on the engine that will serve.

    Example: sedac-probes collect --out build/streams --samples 320
    """
    from sedac_probes.collect import collect as run

    chosen = tuple(sorted(int(part) for part in layers.split(",") if part))
    made = run(out, model, read_documents(texts, "train", samples), layers=chosen, max_length=max_length)
    typer.echo(f"{out}: {made.num_documents} documents, checkpoints after layers {', '.join(map(str, made.layers))} of {made.num_layers}")
