"""The command `calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sedac_probes.commands.options import DEMO, MaxLength, Model, Samples, Texts, read_documents


def calibrate(
    model: Model = str(DEMO / "model"),
    probe_set: Annotated[Path, typer.Option(help="Directory of the probe set that gets the levels.")] = DEMO / "probe-set",
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

    documents = read_documents(texts, "train", samples)
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
