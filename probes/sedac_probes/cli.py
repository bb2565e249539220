"""The `sedac-probes` command: collect, train, calibrate, validate, compare, and `demo`, which makes the demo model's probe set."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from sedac.errors import SedacError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="From a model and some text to a probe set that `sedac serve` serves.")
_DEMO = Path(__file__).resolve().parents[1] / "demo"
_QUANTILES = (0.02, 0.05, 0.1, 0.2, 0.4)
_PROPOSED = 0.02  # hard exits cost quality fast: the proposed thresholds let about 2 % of the tokens go at each checkpoint

Model = Annotated[str, typer.Option(help="Model directory.")]
Texts = Annotated[list[Path] | None, typer.Option(help="UTF-8 text files; default: the standard library's sources.")]
Layers = Annotated[str, typer.Option(help="Checkpoint layers, 0-based, comma-separated; default: at 19, 41 and 65 % of the depth.")]
Samples = Annotated[int, typer.Option(help="Documents to use.")]
MaxLength = Annotated[int, typer.Option(help="Tokens per document at most.")]


def _read_documents(texts: list[Path] | None, split: str, samples: int) -> list[Any]:
    from sedac_probes import corpus

    documents = [corpus.Document(path=str(p), text=p.read_text(encoding="utf-8")) for p in texts] if texts else corpus.read_stdlib(split)  # type: ignore[arg-type]
    documents = [d for d in documents if len(d.text) >= 200]
    step = max(1, len(documents) // samples)
    return documents[::step][:samples]


@app.command()
def collect(
    out: Annotated[Path, typer.Option(help="Directory for the shards; a collection that was stopped is resumed.")],
    model: Model = str(_DEMO / "model"),
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
    made = run(out, model, _read_documents(texts, "train", samples), layers=chosen, max_length=max_length)
    typer.echo(f"{out}: {made.num_documents} documents, checkpoints after layers {', '.join(map(str, made.layers))} of {made.num_layers}")


@app.command()
def train(
    collection: Annotated[Path, typer.Option(help="What `collect` wrote.")],
    out: Annotated[Path, typer.Option(help="Directory of the new probe set.")],
    name: Annotated[str, typer.Option(help="Name of the probe set; lower case.")],
    rank: Annotated[int, typer.Option(help="Rank of the probes.")] = 64,
    epochs: Annotated[int, typer.Option(help="At most; stops early when held-out loss stops falling.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Tokens per step.")] = 1024,
    lr: Annotated[float, typer.Option(help="AdamW's learning rate.")] = 2e-3,
) -> None:
    """Fit one probe per checkpoint to log1p of the final entropy and write the probe set.

    Example: sedac-probes train --collection build/streams --out build/probe-set --name demo
    """
    import torch
    from sedac.probe import artifact
    from sedac.probe.manifest import Manifest, ProbeRecord

    from sedac_probes.train import TARGET, read_description, train_probe

    description: Any = read_description(collection)
    table = Table("layer", "Spearman", "Huber loss", *(f"risk at {q:.0%}" for q in _QUANTILES), title="held-out tokens", box=None)
    probes, records = {}, []
    for layer in description["layers"]:
        made = train_probe(collection, layer, rank=rank, max_epochs=epochs, batch_size=batch_size, lr=lr)
        quantiles = torch.quantile(made.risk[:1_000_000], torch.tensor(_QUANTILES)).tolist()
        probes[layer] = made.probe
        metrics = {"spearman": made.spearman, "huber": made.huber} | {f"risk_q{q}": v for q, v in zip(_QUANTILES, quantiles, strict=True)}
        records.append(ProbeRecord(layer=layer, threshold=round(quantiles[_QUANTILES.index(_PROPOSED)], 4), metrics=metrics))
        table.add_row(str(layer), f"{made.spearman:.3f}", f"{made.huber:.4f}", *(f"{v:.3f}" for v in quantiles))
    manifest = Manifest(
        name=name,
        model=Path(description["model"]).name,
        hidden_size=description["hidden_size"],
        num_layers=description["num_layers"],
        rank=rank,
        target=TARGET,
        probes=tuple(records),
        training={k: description[k] for k in ("num_documents", "max_length", "data_digest")} | {"lr": lr, "batch_size": batch_size},
    )
    Console().print(table)
    typer.echo(f"{out}: sha256 {artifact.save(out, manifest, probes).sha256}")


@app.command()
def validate(
    probe_set: Annotated[Path, typer.Option(help="Directory of the probe set.")] = _DEMO / "probe-set",
    model: Model = str(_DEMO / "model"),
    texts: Texts = None,
    samples: Samples = 32,
    max_length: MaxLength = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure what thresholds save and cost on held-out text, with the per-token rule applied (hard exits).

    One row per share of tokens that each checkpoint alone would let go: the perplexity ratio and the agreement stand beside
    every saving. Example: sedac-probes validate --samples 64
    """
    from sedac.probe.manifest import read_manifest

    from sedac_probes.validate import validate as run

    manifest = read_manifest(probe_set)
    policies = [{p.layer: p.metrics[f"risk_q{q}"] for p in manifest.probes} for q in _QUANTILES]
    results = run(model, probe_set, [d.text for d in _read_documents(texts, "heldout", samples)], policies, max_length=max_length)
    if as_json:
        typer.echo(json.dumps([{"quantile": q, **asdict(r)} for q, r in zip(_QUANTILES, results, strict=True)], indent=2))
        return
    columns = [f"exit at {p.layer}" for p in manifest.probes]
    table = Table(
        "quantile", *columns, "MLP FLOPs saved", "perplexity ratio", "agreement", title=f"{results[0].num_tokens} held-out tokens", box=None
    )
    for q, r in zip(_QUANTILES, results, strict=True):
        rates = [f"{rate:.1%}" for rate in r.exit_rates.values()]
        table.add_row(f"{q:.0%}", *rates, f"{r.skipped:.1%}", f"{r.perplexity_ratio:.4f}", f"{r.agreement:.4f}")
    Console().print(table)


@app.command()
def calibrate(
    model: Model = str(_DEMO / "model"),
    probe_set: Annotated[Path, typer.Option(help="Directory of the probe set that gets the levels.")] = _DEMO / "probe-set",
    out: Annotated[Path | None, typer.Option(help="Directory of the new probe set; default: in place.")] = None,
    report: Annotated[Path, typer.Option(help="Where to write NAME.json and NAME.png.")] = Path("build/calibration"),
    texts: Texts = None,
    samples: Samples = 160,
    max_length: MaxLength = 512,
) -> None:
    """Give a probe set its reduced levels and tiers: neurons' order and scales, plan, thresholds, repair, and what each level costs.

    Example: sedac-probes calibrate --model build/model --probe-set build/probe-set
    """
    from sedac.probe import artifact

    from sedac_probes import calibrate as workshop
    from sedac_probes import corpus
    from sedac_probes import report as results
    from sedac_probes.reduced import ReducedModel

    documents = _read_documents(texts, "train", samples)
    loaded, found = ReducedModel(model), artifact.load(probe_set)
    made = workshop.calibrate(loaded, found, [d.text for d in documents], max_length=max_length)
    training = {"num_documents": len(documents), "max_length": max_length, "data_digest": corpus.digest(documents)}
    manifest = workshop.write(out or probe_set, loaded, found, made, training)
    points: dict[str, list[Any]] = {}
    for level, quality in zip(made.levels, made.qualities, strict=True):
        points.setdefault(level.reduction, []).append((level.name, quality))
    tiers = {f"tier {t.name}": [(f"{t.floor}, {t.level}", made.tier_qualities[t.name])] for t in made.tiers if t.name in made.tier_qualities}
    results.print_points(points | tiers, f"levels of {manifest.name}, {made.qualities[0].num_tokens} tokens of calibration text kept aside")
    results.write_json(report.with_suffix(".json"), points | tiers, damage=made.damage, score=made.score, training=training)
    results.draw(report.with_suffix(".png"), points, f"levels of {manifest.name} on calibration text")
    typer.echo(f"{out or probe_set}: sha256 {manifest.sha256}; {report.with_suffix('.json')}, {report.with_suffix('.png')}")


@app.command()
def compare(
    out: Annotated[Path, typer.Option(help="Where to write NAME.json and NAME.png.")] = Path("build/quality"),
    model: Model = str(_DEMO / "model"),
    probe_set: Annotated[Path, typer.Option(help="Directory of the probe set, calibrated.")] = _DEMO / "probe-set",
    texts: Texts = None,
    samples: Samples = 32,
    max_length: MaxLength = 512,
) -> None:
    """Measure all mechanisms on held-out text: saved MLP FLOPs, perplexity ratio, top-1 agreement and KL, all tokens subject.

    Example: sedac-probes compare --out build/quality --samples 64
    """
    from sedac.probe import artifact

    from sedac_probes import compare as workshop
    from sedac_probes import corpus
    from sedac_probes import report as results
    from sedac_probes.reduced import ReducedModel

    documents, savings = _read_documents(texts, "heldout", samples), (0.1, 0.2, 0.3)
    loaded, found = ReducedModel(model), artifact.load(probe_set)
    calibration = [d.text for d in _read_documents(texts, "train", 16)]
    points = workshop.compare(loaded, found, [d.text for d in documents], calibration, max_length=max_length)
    num_tokens = next(iter(points.values()))[0][1].num_tokens
    results.print_points(points, f"{num_tokens} held-out tokens")
    equal = results.print_equal_savings(points, savings)
    data = {"num_documents": len(documents), "data_digest": corpus.digest(documents), "num_tokens": num_tokens}
    results.write_json(
        out.with_suffix(".json"), points, probe_set=found.manifest.sha256, data=data, equal_savings={"saved": savings, "perplexity_ratio": equal}
    )
    results.draw(out.with_suffix(".png"), points, f"{Path(model).name}: {num_tokens} held-out tokens")
    typer.echo(f"{out.with_suffix('.json')}, {out.with_suffix('.png')}")


@app.command()
def demo(
    work: Annotated[Path, typer.Option(help="Work directory; a run that was stopped is resumed.")] = Path("build/demo-probes"),
    out: Annotated[Path, typer.Option(help="Directory of the probe set.")] = _DEMO / "probe-set",
) -> None:
    """Make the demo model's probe set: collect, train and calibrate. `sedac-probes compare` then tells what it is worth."""
    collect(out=work / "streams")
    train(collection=work / "streams", out=out, name="demo")
    calibrate(probe_set=out, report=work / "calibration")


def main() -> None:
    """Run the command; errors that SEDAC raises on purpose end in one line and exit code 1."""
    try:
        app()
    except SedacError as error:
        typer.echo(f"sedac-probes: {error}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
