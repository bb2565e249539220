"""The command `train`."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sedac_probes.commands.options import Texts, read_documents

QUANTILES = (0.02, 0.05, 0.1, 0.2, 0.4)
_PROPOSED = 0.02  # hard exits cost quality fast: the proposed thresholds let about 2 % of the tokens go at each checkpoint


class Target(StrEnum):
    """What risk predicts."""

    entropy = "entropy"
    damage = "damage"


class Transform(StrEnum):
    """What damage is turned into before it is fitted."""

    log = "log"
    rank = "rank"


def train(
    collection: Annotated[Path, typer.Option(help="What `collect` wrote.")],
    out: Annotated[Path, typer.Option(help="Directory of the new probe set.")],
    name: Annotated[str, typer.Option(help="Name of the probe set; lower case.")],
    target: Annotated[Target, typer.Option(help="entropy: log1p of the final entropy; damage: the KL of reducing this token.")] = Target.entropy,
    damage_level: Annotated[str, typer.Option(help="What a token is reduced to: skip, or a level of --levels-from.")] = "skip",
    levels_from: Annotated[Path | None, typer.Option(help="Calibrated probe set that has the level.")] = None,
    transform: Annotated[Transform, typer.Option(help="Of damage: its rank, or log1p(damage / median).")] = Transform.rank,
    texts: Texts = None,
    rank: Annotated[int, typer.Option(help="Rank of the probes.")] = 64,
    epochs: Annotated[int, typer.Option(help="At most; stops early when held-out loss stops falling.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Tokens per step.")] = 1024,
    lr: Annotated[float, typer.Option(help="AdamW's learning rate.")] = 2e-3,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.")] = 0.01,
    report: Annotated[Path | None, typer.Option(help="Where train.json and train.png go; default: beside the collection.")] = None,
) -> None:
    """Fit one probe per checkpoint and write the probe set, with train.json and train.png.

    Target entropy is cheap, damage orders tokens by what reducing them costs; it is measured first, on the CPU, beside the collection,
    and a run that was stopped goes on. For texts of your own give the same --texts as to `collect`. With target entropy, damage is
    measured on the held-out documents alone, for the report. Example: sedac-probes train --collection build/streams --out build/set
    --name mine --target damage
    """
    import torch
    from sedac.probe import artifact
    from sedac.probe.manifest import Manifest, ProbeRecord

    from sedac_probes.training import train as workshop

    description: Any = workshop.read_description(collection)
    damage = _measure(collection, description, texts, damage_level, levels_from, whole=target is Target.damage)
    columns = ("layer", "Spearman", "with damage", "Huber loss", "over-confident", "under-confident", *(f"risk at {q:.0%}" for q in QUANTILES))
    table = Table(*columns, title="held-out tokens", box=None)
    probes, records, rows = {}, [], []
    for layer in description["layers"]:
        made = workshop.train_probe(
            collection, layer, target=target.value, damage=damage, transform=transform.value, rank=rank,
            max_epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay,
        )  # fmt: skip
        quantiles = torch.quantile(made.risk[:1_000_000], torch.tensor(QUANTILES)).tolist()
        probes[layer] = made.probe
        metrics = {"spearman": made.spearman, "huber": made.huber} | {f"risk_q{q}": v for q, v in zip(QUANTILES, quantiles, strict=True)}
        metrics |= {} if made.spearman_damage is None else {"spearman_damage": made.spearman_damage}
        records.append(ProbeRecord(layer=layer, threshold=round(quantiles[QUANTILES.index(_PROPOSED)], 4), metrics=metrics))
        shown = ("spearman", "spearman_damage", "huber", "overconfident", "underconfident", "calibration", "losses")
        rows.append({"layer": layer, "num_heldout_tokens": len(made.risk)} | {key: getattr(made, key) for key in shown})
        sides = (f"{side['share']:.0%} by {side['size']:.3f}" for side in (made.overconfident, made.underconfident))
        correlation = "-" if made.spearman_damage is None else f"{made.spearman_damage:.3f}"
        table.add_row(str(layer), f"{made.spearman:.3f}", correlation, f"{made.huber:.4f}", *sides, *(f"{v:.3f}" for v in quantiles))
    words = workshop.describe_target(target.value, transform.value, damage_level)
    data = {k: description[k] for k in ("num_documents", "max_length", "data_digest")}
    settings = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay}
    manifest = Manifest(
        name=name,
        model=Path(description["model"]).name,
        hidden_size=description["hidden_size"],
        num_layers=description["num_layers"],
        rank=rank,
        target=words,
        probes=tuple(records),
        training=data | settings,
    )
    sha256 = artifact.save(out, manifest, probes).sha256
    report = report or collection.parent
    report.mkdir(parents=True, exist_ok=True)
    written = {"kind": "train", "target": words, "probe_set": sha256, "data": data, "settings": settings | {"rank": rank}, "probes": rows}
    (report / "train.json").write_text(json.dumps(written, indent=1) + "\n")
    _draw(report / "train.png", rows, words)
    Console().print(table)
    typer.echo(f"{out}: sha256 {sha256}; {report / 'train.json'}, {report / 'train.png'}")


def _measure(collection: Path, description: Any, texts: list[Path] | None, level: str, levels_from: Path | None, *, whole: bool) -> Path | None:
    """Measure damage, of all documents or of the held-out ones; None where it is not needed and can't be had."""
    from sedac.errors import ConfigError
    from sedac.policy.weights import get_weights_digest

    from sedac_probes import corpus
    from sedac_probes.calibration.reduced import ReducedModel
    from sedac_probes.training import damage

    recorded = description.get("weights_sha256", "")  # converted collections have none
    if recorded and recorded != (present := get_weights_digest(description["model"])):
        raise ConfigError(f"{collection} was recorded from weights {recorded[:12]}, {description['model']} has {present[:12]} now; collect again")
    documents = read_documents(texts, "train", description["num_documents"], description["model"])
    if corpus.digest(documents) != description["data_digest"]:
        problem = f"{collection} was collected from other texts (sha256 {description['data_digest'][:12]}); give the same --texts as to `collect`"
        if whole:
            raise ConfigError(f"damage can't be measured: {problem}")
        typer.echo(f"no rank correlation with damage: {problem}", err=True)
        return None
    try:
        model = ReducedModel(description["model"])
    except ConfigError as error:
        if whole:
            raise
        typer.echo(f"no rank correlation with damage: {error}", err=True)
        return None
    ids = [model.tokenizer(d.text)["input_ids"][: description["max_length"] - 1] for d in documents]  # as `collect` cuts them
    settings = {"level": level, "levels_from": str(levels_from or ""), "data_digest": description["data_digest"]}
    damage.write_settings(collection / f"damage-{level}", settings | {"layers": description["layers"]})
    form = damage.make_form(model, level, levels_from)
    return damage.measure_collection(collection, model, ids, description["layers"], form, level, heldout_only=not whole)


def _draw(path: Path, rows: list[dict[str, Any]], words: str) -> None:
    """Draw each checkpoint's calibration curve and, below it, the held-out loss by epoch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(rows), figsize=(4 * len(rows), 6.5), squeeze=False)
    for column, row in enumerate(rows):
        above, below = axes[0][column], axes[1][column]
        predicted, observed = ([point[key] for point in row["calibration"]] for key in ("predicted", "observed"))
        top = max(predicted + observed)
        above.plot([0, top], [0, top], ":", color="grey", label="perfect")
        above.plot(predicted, observed, "o-", markersize=4, label=f"Spearman {row['spearman']:.2f}")
        above.set(title=f"layer {row['layer']}", xlabel="predicted risk", ylabel="mean target, by decile")
        below.plot(range(1, len(row["losses"]) + 1), row["losses"], "s-", markersize=3)
        below.set(xlabel="epoch", ylabel="held-out Huber loss")
        above.legend(fontsize=8)
        for panel in (above, below):
            panel.grid(alpha=0.3)
    figure.suptitle(f"target: {words}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
