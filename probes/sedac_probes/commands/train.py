"""The command `train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

QUANTILES = (0.02, 0.05, 0.1, 0.2, 0.4)
_PROPOSED = 0.02  # hard exits cost quality fast: the proposed thresholds let about 2 % of the tokens go at each checkpoint


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
    table = Table("layer", "Spearman", "Huber loss", *(f"risk at {q:.0%}" for q in QUANTILES), title="held-out tokens", box=None)
    probes, records = {}, []
    for layer in description["layers"]:
        made = train_probe(collection, layer, rank=rank, max_epochs=epochs, batch_size=batch_size, lr=lr)
        quantiles = torch.quantile(made.risk[:1_000_000], torch.tensor(QUANTILES)).tolist()
        probes[layer] = made.probe
        metrics = {"spearman": made.spearman, "huber": made.huber} | {f"risk_q{q}": v for q, v in zip(QUANTILES, quantiles, strict=True)}
        records.append(ProbeRecord(layer=layer, threshold=round(quantiles[QUANTILES.index(_PROPOSED)], 4), metrics=metrics))
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
