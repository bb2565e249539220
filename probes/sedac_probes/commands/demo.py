"""The command `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sedac_probes.commands.calibrate import calibrate
from sedac_probes.commands.collect import collect
from sedac_probes.commands.options import DEMO
from sedac_probes.commands.train import train


def demo(
    work: Annotated[Path, typer.Option(help="Work directory; a run that was stopped is resumed.")] = Path("build/demo-probes"),
    out: Annotated[Path, typer.Option(help="Directory of the probe set.")] = DEMO / "probe-set",
) -> None:
    """Make the demo model's probe set: collect, train and calibrate. `sedac-probes compare` then tells what it is worth."""
    collect(out=work / "streams")
    train(collection=work / "streams", out=out, name="demo")
    calibrate(probe_set=out, report=work / "calibration")
