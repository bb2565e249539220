"""The command `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sedac_probes.commands.options import DEMO, MaxLength, Model, Samples, Texts, read_documents


def compare(
    out: Annotated[Path, typer.Option(help="Where to write NAME.json and NAME.png.")] = Path("build/quality"),
    model: Model = str(DEMO / "model"),
    probe_set: Annotated[Path, typer.Option(help="Directory of the probe set, calibrated.")] = DEMO / "probe-set",
    texts: Texts = None,
    samples: Samples = 32,
    max_length: MaxLength = 512,
) -> None:
    """Measure all mechanisms on held-out text: saved MLP FLOPs, perplexity ratio, top-1 agreement and KL, all tokens subject.

    Example: sedac-probes compare --out build/quality --samples 64
    """
    from sedac.probe import artifact

    from sedac_probes import corpus
    from sedac_probes.calibration import compare as workshop
    from sedac_probes.calibration import report as results
    from sedac_probes.calibration.reduced import ReducedModel

    documents, savings = read_documents(texts, "heldout", samples, model), (0.1, 0.2, 0.3)
    loaded, found = ReducedModel(model), artifact.load(probe_set)
    calibration = [d.text for d in read_documents(texts, "train", 16, model)]
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
