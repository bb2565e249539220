"""The command line; see the package."""

from __future__ import annotations

import typer

from benchmarks import control
from benchmarks.control.away import away
from benchmarks.control.fleet import fleet
from benchmarks.control.load import load

app = typer.Typer(no_args_is_help=True, add_completion=False, help=control.__doc__, rich_markup_mode=None, pretty_exceptions_enable=False)
for command in (fleet, load, away):
    app.command()(command)

if __name__ == "__main__":
    app()
