"""Options that several commands of `sedac-probes` share, and how they read texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import sedac_demo
import typer
from sedac.errors import ConfigError

DEMO = sedac_demo.DIRECTORY

Model = Annotated[str, typer.Option(help="Model directory.")]
Texts = Annotated[
    list[Path] | None,
    typer.Option(
        help="UTF-8 text, .jsonl (text, messages, or prompt and completion), a directory of those, or hf:DATASET[:SPLIT[:FIELD]]; may be repeated. "
        "Default: the standard library's sources."
    ),
]
Layers = Annotated[str, typer.Option(help="Checkpoint layers, 0-based, comma-separated; default: at 19, 41 and 65 % of the depth.")]
Samples = Annotated[int, typer.Option(help="Documents to use.")]
MaxLength = Annotated[int, typer.Option(help="Tokens per document at most.")]


def read_documents(texts: list[Path] | None, split: str, samples: int, model: str = "") -> list[Any]:
    """Return up to `samples` documents, spread evenly over the texts or over one split of the demo corpus; `model` renders chats.

    Raises:
        ConfigError: a text can't be read, or `samples` is below 1.
    """
    from sedac_probes import corpus
    from sedac_probes.collecting.texts import read_texts

    if samples < 1:
        raise ConfigError(f"--samples is {samples}; give at least 1")
    documents = read_texts([str(path) for path in texts], model) if texts else corpus.read_stdlib(split)  # type: ignore[arg-type]
    step = max(1, len(documents) // samples)
    return documents[::step][:samples]


def parse_layers(text: str) -> tuple[int, ...]:
    """Return the layers of a list such as 2,5,8, in the order given.

    Raises:
        ConfigError: a part is no number.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if wrong := [part for part in parts if not part.removeprefix("-").isdecimal()]:
        raise ConfigError(f"--layers has {wrong[0]!r}; give layer numbers separated by commas, such as 2,5,8")
    return tuple(int(part) for part in parts)
