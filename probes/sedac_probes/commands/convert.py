"""The command `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from sedac.errors import ConfigError


def convert(
    source: Annotated[Path, typer.Argument(help="Directory of the earlier versions' files, of a probe set, or of a collection.")],
    out: Annotated[Path, typer.Option(help="The new directory; appears whole or not at all.")],
    model: Annotated[str, typer.Option(help="Model directory; needed from the earlier layout, which names no model.")] = "",
    layers: Annotated[str, typer.Option(help="Convert these alone, 0-based, comma-separated; default: all.")] = "",
    threshold: Annotated[list[str] | None, typer.Option(help="LAYER=RISK, may be repeated; goes before sedac_config.json's.")] = None,
    name: Annotated[str, typer.Option(help="Name of the new probe set; lower case.")] = "converted",
    part: Annotated[str, typer.Option(help="probes or streams, where the source holds both.")] = "",
) -> None:
    """Convert the earlier versions' probes and recorded streams to ours, or ours to theirs; the source says which.

    sedac_probe_layerN.pth <-> probe set; hidden_states_layerN.pt with entropies <-> collection, for `sedac-probes train`. Pickles are
    opened for their tensors alone: one with code in it is refused and never run. Thresholds come from sedac_config.json beside the
    probes (v6_thresholds), else from --threshold, else they are 0, which lets no token go.

    Examples:

        sedac-probes convert old/sedac_data --part probes --model MODEL_DIR --threshold 7=0.8 --threshold 14=1.3 --out build/probe-set

        sedac-probes convert build/probe-set --out build/sedac_data
    """
    from sedac_probes.legacy.convert import convert as run

    try:
        chosen = tuple(int(text) for text in layers.split(",") if text)
        thresholds = {int(layer): float(risk) for layer, _, risk in (text.partition("=") for text in threshold or ())}
    except ValueError as error:
        raise ConfigError(f"--layers is 7,14,21 and --threshold 7=0.8: {error}") from error
    if part not in ("", "probes", "streams"):
        raise ConfigError(f"--part is {part}; say probes or streams")
    made = run(source, out, model=model, layers=chosen, thresholds=thresholds, name=name, part=part or None)  # type: ignore[arg-type]
    for note in made.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"{out}: {made.kind}, layers {', '.join(map(str, made.layers))}, sha256 {made.sha256}")
