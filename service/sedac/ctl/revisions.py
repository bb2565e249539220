"""`sedac ctl policy revisions|rollback|diff|watch`: the policy's history."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.text import Text

from sedac.client.client import ControlClient
from sedac.client.diff import find_policy_changes
from sedac.contract import wire
from sedac.contract.v1 import control_pb2
from sedac.ctl.cells import format_time
from sedac.ctl.completion import complete_revision
from sedac.ctl.options import AsJson, Comment, Limit, Wait, read_policy_file
from sedac.ctl.policy_tables import make_changes_table, make_revisions_table
from sedac.ctl.session import connected, finish, show_events, show_list
from sedac.policy.model import Policy

app = typer.Typer()


@app.command("revisions")
@connected
def list_revisions(client: ControlClient, limit: Limit = 1000, as_json: AsJson = False) -> None:
    """List revisions, newest first."""
    show_list(islice(client.list_revisions(), limit), as_json, make_revisions_table)


@app.command("rollback")
@connected
def rollback_policy(
    client: ControlClient,
    revision: Annotated[int, typer.Argument(help="The revision whose content comes back.", autocompletion=complete_revision)],
    comment: Comment = "",
    wait: Wait = 0.0,
    as_json: AsJson = False,
) -> None:
    """Make the content of an older revision the newest one; numbers only grow."""
    finish(client, client.rollback(revision, comment=comment), wait, as_json)


@app.command("diff")
@connected
def diff_policies(
    client: ControlClient,
    before: Annotated[str, typer.Argument(help="A revision, or a file as `policy get --json` prints it.", autocompletion=complete_revision)],
    after: Annotated[str, typer.Argument(help="The same; left out: see the examples.", autocompletion=complete_revision)] = "",
    as_json: AsJson = False,
) -> None:
    """Show which knobs differ between two revisions, or between a file and what is in force.

    Examples:

        sedac ctl policy diff 3 5               from revision 3 to 5

        sedac ctl policy diff 3                 from revision 3 to the one in force

        sedac ctl policy diff policy.json       what applying the file would change
    """
    sides: tuple[int | Policy, int | Policy] = (_read_side(before), _read_side(after) if after else 0)
    if not after and isinstance(sides[0], Policy):
        sides = (0, sides[0])
    changes = client.diff_policies(*sides)
    if as_json:
        typer.echo(json.dumps([vars(change) for change in changes], indent=2))
    else:
        Console().print(make_changes_table(changes))


def _read_side(text: str) -> int | Policy:
    return int(text) if text.isdecimal() else wire.policy_from_proto(read_policy_file(Path(text)))


@app.command("watch")
@connected
def watch_policy(
    client: ControlClient,
    from_revision: Annotated[int, typer.Option(help="The first one wanted; 0: the one in force.", autocompletion=complete_revision)] = 0,
    as_json: AsJson = False,
) -> None:
    """Show every revision as it is made, without a gap, until Ctrl-C; goes on by itself when the service was away for a moment."""
    last: list[Policy] = []

    def render(made: control_pb2.Policy) -> RenderableType:
        """Return the title of a revision and its changes from the one before."""
        policy = wire.policy_from_proto(made)
        changes = find_policy_changes(last[0], policy) if last else ()
        last[:] = [policy]
        title = Text(f"revision {made.revision}  {format_time(made, 'revision_create_time')} by {made.author or '-'}", style="bold")
        title.append(f"  {made.comment}", style="default")
        return Group(title, *(Text(f"  {change}") for change in changes))

    show_events(client.watch_policy(from_revision), as_json, render)
