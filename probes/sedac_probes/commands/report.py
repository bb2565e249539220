"""The command `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    work: Annotated[Path, typer.Argument(help="Work directory: where collect, train, calibrate, compare and certify wrote.")],
    out: Annotated[Path | None, typer.Option(help="The page; default: report.html in the work directory.")] = None,
    probe_set: Annotated[Path | None, typer.Option(help="Directory of the probe set; default: probe-set in the work directory.")] = None,
    model: Annotated[str, typer.Option(help="Model directory, for the commands on the page; default: the collection's.")] = "",
) -> None:
    """Put a workshop run on one HTML page: data, probes, levels, mechanisms compared, the certificate, and what to do next.

    One file with everything in it: no network, no scripts; it can be sent and printed. What the work directory lacks is left out,
    with the command that makes it.

    Example: sedac-probes report build/demo-probes --probe-set probes/sedac_demo/probe-set
    """
    from sedac_probes.page.page import make_page, write_page

    target = out or work / "report.html"
    write_page(target, make_page(work, probe_set or work / "probe-set", model=model))
    typer.echo(f"{target}: {target.stat().st_size / 1024:.0f} KiB")
