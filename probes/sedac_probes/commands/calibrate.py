"""The command `calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from sedac.errors import ConfigError

from sedac_probes.commands.options import DEMO, MaxLength, Model, Samples, Texts, read_documents


def calibrate(
    model: Model = str(DEMO / "model"),
    probe_set: Annotated[Path, typer.Option(help="Directory of the probe set that gets the levels.")] = DEMO / "probe-set",
    out: Annotated[Path | None, typer.Option(help="Directory of the new probe set; default: in place.")] = None,
    report: Annotated[Path, typer.Option(help="Where to write NAME.json and NAME.png.")] = Path("build/calibration"),
    texts: Texts = None,
    samples: Samples = 160,
    max_length: MaxLength = 512,
    collection: Annotated[Path | None, typer.Option(help="What `collect` wrote: take the neurons' statistics that the engine recorded.")] = None,
    exit_rates: Annotated[str, typer.Option(help="Set thresholds so that this share of tokens exits: one rate, or one per checkpoint.")] = "",
    max_ratio: Annotated[float | None, typer.Option(help="Find one more tier: the most saving one up to this perplexity ratio.")] = None,
    saving: Annotated[float | None, typer.Option(help="Find one more tier: the best one that saves this share of MLP FLOPs.")] = None,
    tier: Annotated[str, typer.Option(help="Name of that tier.")] = "target",
) -> None:
    """Give a probe set its reduced levels and tiers: neurons' order and scales, plan, thresholds, repair, and what each level costs.

    Every set gets the tiers conservative, balanced and aggressive (perplexity ratio at most 1.003, 1.01, 1.03 on calibration text
    kept aside); --max-ratio or --saving adds one of your own. Nothing here is certified: `sedac-probes certify` does that.

    Example: sedac-probes calibrate --model build/model --probe-set build/probe-set --saving 0.3
    """
    from sedac.probe import artifact

    from sedac_probes import corpus
    from sedac_probes.calibration import calibrate as workshop
    from sedac_probes.calibration import report as results
    from sedac_probes.calibration.reduced import ReducedModel
    from sedac_probes.calibration.tiers import Target
    from sedac_probes.collecting.collection import read_statistics

    targets = dict(workshop.TARGETS)
    if max_ratio is not None and saving is not None:
        raise ConfigError("--max-ratio and --saving are two targets for one tier; give one")
    if max_ratio is not None or saving is not None:
        if not (max_ratio is None or max_ratio > 1) or not (saving is None or 0 < saving < 1):
            raise ConfigError(f"--max-ratio {max_ratio}, --saving {saving}: a ratio is over 1, a saving between 0 and 1")
        targets[tier] = Target(max_ratio=max_ratio, min_saved=saving)
    documents = read_documents(texts, "train", samples, model)
    loaded, found = ReducedModel(model), artifact.load(probe_set)
    rates = [float(part) for part in exit_rates.split(",") if part]
    rates = rates * len(found.probes) if len(rates) == 1 else rates
    statistics = read_statistics(collection) if collection else None
    made = workshop.calibrate(
        loaded, found, [d.text for d in documents], max_length=max_length, exit_rates=rates, targets=targets, statistics=statistics
    )
    training = {"num_documents": len(documents), "max_length": max_length, "data_digest": corpus.digest(documents)}
    manifest = workshop.write(out or probe_set, loaded, found, made, training)
    points: dict[str, list[Any]] = {}
    for level, quality in zip(made.levels, made.qualities, strict=True):
        points.setdefault(level.reduction, []).append((level.name, quality))
    points["hard exit"] = [(f"{rate:.0%} of tokens at each checkpoint", quality) for rate, quality in made.exits]
    points |= {
        f"tier {t.name}": [(f"{t.floor}, {t.level}, thresholds x {t.threshold_scale:g}", made.tier_qualities[t.name])]
        for t in made.tiers
        if t.name in made.tier_qualities
    }
    results.print_points(points, f"levels of {manifest.name}, {made.qualities[0].num_tokens} tokens of calibration text kept aside")
    results.write_json(
        report.with_suffix(".json"), points, kind="calibrate", probe_set=manifest.sha256, damage=made.damage, plans=made.plans, score=made.score,
        thresholds=made.thresholds, training=training,
    )  # fmt: skip
    results.draw(report.with_suffix(".png"), points, f"levels of {manifest.name} on calibration text")
    typer.echo(f"{out or probe_set}: sha256 {manifest.sha256}; {report.with_suffix('.json')}, {report.with_suffix('.png')}")
