"""The command `validate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sedac_probes.commands.options import DEMO, MaxLength, Model, Samples, Texts, read_documents
from sedac_probes.commands.train import QUANTILES


def validate(
    probe_set: Annotated[Path, typer.Option(help="Directory of the probe set.")] = DEMO / "probe-set",
    model: Model = str(DEMO / "model"),
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
    policies = [{p.layer: p.metrics[f"risk_q{q}"] for p in manifest.probes} for q in QUANTILES]
    results = run(model, probe_set, [d.text for d in read_documents(texts, "heldout", samples)], policies, max_length=max_length)
    if as_json:
        typer.echo(json.dumps([{"quantile": q, **asdict(r)} for q, r in zip(QUANTILES, results, strict=True)], indent=2))
        return
    columns = [f"exit at {p.layer}" for p in manifest.probes]
    table = Table(
        "quantile", *columns, "MLP FLOPs saved", "perplexity ratio", "agreement", title=f"{results[0].num_tokens} held-out tokens", box=None
    )
    for q, r in zip(QUANTILES, results, strict=True):
        rates = [f"{rate:.1%}" for rate in r.exit_rates.values()]
        table.add_row(f"{q:.0%}", *rates, f"{r.skipped:.1%}", f"{r.perplexity_ratio:.4f}", f"{r.agreement:.4f}")
    Console().print(table)
