"""`sedac ctl probe-set`: probe sets over the wire."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from sedac.client import probe_files
from sedac.client.client import ControlClient
from sedac.ctl.completion import complete_probe_set
from sedac.ctl.options import AsJson
from sedac.ctl.probe_set_tables import make_probe_set_table, make_probe_sets_table
from sedac.ctl.session import connected, show, show_list

app = typer.Typer(
    no_args_is_help=True,
    help="""Probe sets: upload them, let a policy name them, and every engine fetches, verifies and switches without a restart.

    Examples:

        sedac ctl probe-set upload build/mine/probe-set

        sedac ctl probe-set show mine

        sedac ctl policy set --probe-set mine --wait 30
    """,
)
Name = Annotated[str, typer.Argument(help="The set's name.", autocompletion=complete_probe_set)]


@app.command("upload")
@connected
def upload(
    client: ControlClient,
    directory: Annotated[
        Path, typer.Argument(help="With manifest.json and probes.safetensors, as `sedac-probes` writes it.", exists=True, file_okay=False)
    ],
    as_json: AsJson = False,
) -> None:
    """Upload a set under the name in its manifest. The name belongs to this content for ever; the same again changes nothing.

    The service keeps nothing of a set that it refuses. The answer says which connected engines can load it, and why one can't.
    """
    with _show_progress("upload") as progress:
        uploaded = client.upload_probe_set(directory, progress=progress)
    show(uploaded, as_json, make_probe_set_table)


@app.command("list")
@connected
def list_probe_sets(client: ControlClient, as_json: AsJson = False) -> None:
    """List the uploaded sets by name."""
    show_list(client.list_probe_sets(), as_json, make_probe_sets_table)


@app.command("show")
@connected
def show_probe_set(client: ControlClient, name: Name, as_json: AsJson = False) -> None:
    """Show one set: its digest, which engines can load it, and what refers to it."""
    show(client.get_probe_set(name), as_json, make_probe_set_table)


@app.command("delete")
@connected
def delete(client: ControlClient, name: Name, as_json: AsJson = False) -> None:
    """Delete a set; refused while the policy in force, a roll-out or an engine uses it."""
    client.delete_probe_set(name)
    if as_json:
        typer.echo("{}")
    else:
        Console().print(f"deleted {name!r}", markup=False)


@app.command("download")
@connected
def download(
    client: ControlClient,
    name: Name,
    directory: Annotated[Path | None, typer.Argument(help="A new directory; left out: the set's name, here.")] = None,
    sha256: Annotated[str, typer.Option(help="Only if its weights have this digest.")] = "",
    as_json: AsJson = False,
) -> None:
    """Write a set into a new directory, verified; `sedac serve --probe-set DIRECTORY` starts with it."""
    with _show_progress("download") as progress:
        written = client.download_probe_set(name, directory or Path(name), sha256=sha256, progress=progress)
    if as_json:
        show(client.get_probe_set(name), True, make_probe_set_table)
    else:
        Console().print(f"{name} is in {written}", markup=False)


@contextlib.contextmanager
def _show_progress(what: str) -> Iterator[probe_files.Progress]:
    """Draw a bar on standard error, so that --json stays clean."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)
