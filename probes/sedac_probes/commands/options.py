"""Options that several commands of `sedac-probes` share, and how they read texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

DEMO = Path(__file__).resolve().parents[2] / "demo"

Model = Annotated[str, typer.Option(help="Model directory.")]
Texts = Annotated[list[Path] | None, typer.Option(help="UTF-8 text files; default: the standard library's sources.")]
Layers = Annotated[str, typer.Option(help="Checkpoint layers, 0-based, comma-separated; default: at 19, 41 and 65 % of the depth.")]
Samples = Annotated[int, typer.Option(help="Documents to use.")]
MaxLength = Annotated[int, typer.Option(help="Tokens per document at most.")]


def read_documents(texts: list[Path] | None, split: str, samples: int) -> list[Any]:
    """Return up to `samples` documents of at least 200 characters, spread evenly over the texts or over one split of the demo corpus."""
    from sedac_probes import corpus

    documents = [corpus.Document(path=str(p), text=p.read_text(encoding="utf-8")) for p in texts] if texts else corpus.read_stdlib(split)  # type: ignore[arg-type]
    documents = [d for d in documents if len(d.text) >= 200]
    step = max(1, len(documents) // samples)
    return documents[::step][:samples]
