"""The command `distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from sedac.errors import ConfigError

from sedac_probes.commands.options import DEMO, MaxLength, Model, Texts, read_documents

_ALL = 1_000_000  # documents
_HELDOUT_EVERY = 10


def distill(
    work: Annotated[Path, typer.Option(help="Work directory: states, runs and candidates. A run that was stopped goes on; kinds share one table.")],
    kind: Annotated[str, typer.Option(help="adapter, exit-head or reduced; see above.")] = "adapter",
    layers: Annotated[
        str, typer.Option(help="How many of the model's layers a draft runs, from the first: candidates, comma-separated. Default: by kind.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Directory for the best candidate of all runs in --work, for `sedac serve --draft`.")] = None,
    pick: Annotated[str, typer.Option(help="Ship this candidate to --out, such as adapter-3, in place of the best.")] = "",
    report: Annotated[Path | None, typer.Option(help="Where distill.json and distill.png go; default: --work.")] = None,
    model: Model = str(DEMO / "model"),
    texts: Texts = None,
    heldout_texts: Annotated[
        list[Path] | None, typer.Option(help="Texts that judge; may be repeated. Default: every tenth of --texts, or the held-out standard library.")
    ] = None,
    record: Annotated[str, typer.Option(help="Record these depths too, for later runs in --work: as --layers.")] = "",
    samples: Annotated[int, typer.Option(help="Pieces of text to learn from, of up to --max-length tokens.")] = 1024,
    heldout_samples: Annotated[int, typer.Option(help="Held-out texts that the model goes on with.")] = 128,
    own_share: Annotated[float, typer.Option(help="Share of the pieces that the model goes on with by itself after their first tokens.")] = 0.5,
    max_length: MaxLength = 512,
    neurons: Annotated[int, typer.Option(help="Of the head's MLP; default: as many as 5 % of the model's parameters allow, within reason.")] = 0,
    epochs: Annotated[int, typer.Option(help="Passes over the pieces; the head with the lowest held-out loss is kept.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Pieces per step.")] = 8,
    lr: Annotated[float, typer.Option(help="AdamW's learning rate; warm-up, then a cosine.")] = 2e-3,
    probe_set: Annotated[Path | None, typer.Option(help="Probe set whose levels a reduced draft may use.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (the model's own), float32, bfloat16 or float16; record in what will serve.")] = "auto",
    eager: Annotated[bool, typer.Option("--eager", help="Measure costs without torch.compile.")] = False,
    no_measure: Annotated[bool, typer.Option("--no-measure", help="Estimate costs by parameters; start no engine to measure them.")] = False,
) -> None:
    """Make a draft for self-speculation: a small part that proposes tokens, which the whole model verifies. Answers stay the same.

    Kinds: `adapter` (the model's first layers, then one trained decoder layer with a KV cache of its own), `exit-head` (more of the
    model's layers, then a trained MLP without attention), `reduced` (the whole model with parts left out; nothing is trained).

    Adapter and exit head learn the model's whole next-token distribution from states that the serving engine records, on texts and on
    the model's own continuations; only the head is trained. Each candidate is judged by rollouts on held-out texts and timed in the
    engine; the cost model then proposes how many tokens to draft and when to stop.

    Examples:

        sedac-probes distill --work build/draft --layers 2,3,4 --record 6,8 --out build/draft/best

        sedac-probes distill --work build/draft --kind exit-head --layers 6,8 --out build/draft/best

        sedac-probes distill --model MODEL --texts mine.jsonl --work build/mine --out build/mine/draft
    """
    from sedac_probes.drafts import report as shown
    from sedac_probes.drafts.candidates import Job, ship
    from sedac_probes.drafts.distill import distill as run
    from sedac_probes.drafts.fit import FitSettings

    if pick and not out:
        raise ConfigError("--pick names what goes to --out; give --out DIRECTORY")
    documents, heldout = _split(texts, heldout_texts, model)
    job = Job(
        model=model, work=work, documents=documents, heldout=heldout, record=_parse("record", record), samples=samples,
        heldout_samples=heldout_samples, own_share=own_share, max_length=max_length, neurons=neurons, probe_set=probe_set, dtype=dtype,
        settings=FitSettings(epochs=epochs, batch_size=batch_size, lr=lr), is_measured=not no_measure, is_eager=eager,
    )  # fmt: skip
    candidates = run(job, kind, _parse("layers", layers))
    shown.write(report or work, candidates)
    Console(width=None if Console().is_terminal else 200).print(shown.make_table(candidates))
    if out is None:
        return
    if pick and pick not in [c.name for c in candidates]:
        raise ConfigError(f"--pick is {pick!r}; {work} has {', '.join(c.name for c in candidates)}")
    chosen = next(c for c in candidates if c.name == (pick or candidates[0].name))
    ship(work, chosen.name, out)
    why = "as asked" if pick else f"the highest predicted speed-up of {len(candidates)}"
    typer.echo(f"{out}: {chosen.name}, {why}: {chosen.proposal.speedup:.2f} at {chosen.proposal.tokens_per_step:.2f} tokens a step")
    typer.echo(f"serve it: sedac serve {model} --draft {out}")


def _parse(name: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if wrong := [part for part in parts if not part.isdecimal()]:
        raise ConfigError(f"--{name} has {wrong[0]!r}; give numbers of layers separated by commas, such as 2,3,4")
    return tuple(sorted({int(part) for part in parts}))


def _split(texts: list[Path] | None, heldout: list[Path] | None, model: str) -> tuple[list[Any], list[Any]]:
    """Return documents to learn from and to judge with."""
    documents = read_documents(texts, "train", _ALL, model)
    if heldout or not texts:
        return documents, read_documents(heldout, "heldout", _ALL, model)
    if len(documents) < _HELDOUT_EVERY:
        raise ConfigError(f"--texts has {len(documents)} documents, every {_HELDOUT_EVERY}th is held out; give more, or --heldout-texts")
    return [d for i, d in enumerate(documents) if i % _HELDOUT_EVERY], documents[::_HELDOUT_EVERY]
