"""`sedac ctl engine`: the fleet."""

from __future__ import annotations

import datetime

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from sedac.client.client import ControlClient
from sedac.contract.v1 import control_pb2
from sedac.ctl.engine_tables import get_state, make_fleet_table, make_state
from sedac.ctl.options import AsJson
from sedac.ctl.session import connected, show_events, show_list

app = typer.Typer(
    no_args_is_help=True,
    help="""The fleet: which engine runs which revision, and why not the desired one.

    PENDING: has not answered the newest push yet. SYNCED: every worker runs the desired revision. NACKED: refused it, and serves under
    the last good one. STALE: not connected; last known values.

    Examples:

        sedac ctl engine list

        sedac ctl engine watch --json | jq -c '.engines[] | [.engine.engine_id, .state]'
    """,
)


@app.command("list")
@connected
def list_engines(client: ControlClient, as_json: AsJson = False) -> None:
    """List every engine that was heard of within a day."""
    show_list(client.list_engines(), as_json, make_fleet_table)


@app.command("watch")
@connected
def watch_engines(client: ControlClient, as_json: AsJson = False) -> None:
    """Show all engines, then each one whose state changes, until Ctrl-C; counters alone are no change."""
    show_events(client.watch_engines(), as_json, _make_lines)


def _make_lines(update: control_pb2.WatchEnginesResponse) -> RenderableType:
    now = f"{datetime.datetime.now(datetime.UTC):%H:%M:%S}  "
    lines = []
    for e in update.engines:
        wanted = f" (wanted {e.desired_revision})" if e.active_revision != e.desired_revision else ""
        line = Text(f"{now}{e.engine.engine_id}  ") + make_state(get_state(e)) + Text(f"  revision {e.active_revision}{wanted}")
        line.append(f"  roll-out {e.active_rollout}" if e.active_rollout else "").append(f"  {e.error.message}" if e.error.message else "", "red")
        lines.append(line)
    return Group(*lines, *(Text(f"{now}{engine_id}  forgotten: not heard of for a day") for engine_id in update.forgotten_engine_ids))
