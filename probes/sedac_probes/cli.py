"""The `sedac-probes` command: collect, train, calibrate, validate, compare, and `demo`, which makes the demo model's probe set."""

from __future__ import annotations

from typing import Annotated

import typer
from sedac import __version__
from sedac.errors import SedacError

from sedac_probes.commands.calibrate import calibrate
from sedac_probes.commands.certify import certify
from sedac_probes.commands.collect import collect
from sedac_probes.commands.compare import compare
from sedac_probes.commands.convert import convert
from sedac_probes.commands.demo import demo
from sedac_probes.commands.distill import distill
from sedac_probes.commands.report import report
from sedac_probes.commands.train import train
from sedac_probes.commands.validate import validate

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="From a model and some text to a probe set that `sedac serve` serves.")
for command in (collect, train, calibrate, validate, compare, certify, distill, convert, report, demo):
    app.command()(command)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"sedac-probes {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False) -> None:
    pass


def main() -> None:
    """Run the command; errors that SEDAC raises on purpose end in one line and exit code 1."""
    try:
        app()
    except SedacError as error:
        typer.echo(f"sedac-probes: {error}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
