"""`sedac ctl audit`: the audit log."""

from __future__ import annotations

from itertools import islice

import typer

from sedac.client.client import ControlClient
from sedac.ctl.options import AsJson, Limit
from sedac.ctl.probe_set_tables import make_audit_table
from sedac.ctl.session import connected, show_list

app = typer.Typer(
    no_args_is_help=True,
    help="""The audit log: every accepted change, who made it, and what it changed; for administrators.

    Examples:

        sedac ctl audit list --limit 20

        sedac ctl audit list --json | jq '.[] | select(.principal == "guard")'
    """,
)


@app.command("list")
@connected
def list_entries(client: ControlClient, limit: Limit = 50, as_json: AsJson = False) -> None:
    """List entries, newest first, with the fields that each change changed; --json has the whole state before and after."""
    show_list(islice(client.list_audit_entries(), limit), as_json, make_audit_table)
