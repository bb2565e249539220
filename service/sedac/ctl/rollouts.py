"""`sedac ctl rollout`: a candidate policy beside the one in force."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from sedac.client.client import ControlClient
from sedac.client.steps import ENDED
from sedac.contract import wire
from sedac.contract.v1 import rollouts_pb2
from sedac.ctl import rollout_tables
from sedac.ctl.cells import format_time
from sedac.ctl.completion import complete_revision, complete_rollout
from sedac.ctl.options import AsJson, Comment, Limit, Wait, read_policy_file
from sedac.ctl.session import connected, show, show_events, show_list

app = typer.Typer(
    no_args_is_help=True,
    help="""Roll-outs: a candidate policy for a share of the requests first, promoted or taken back by what is measured.

    It serves a growing share beside the policy in force. No data pauses it; a breach aborts it; nothing is promoted without a verdict.

    Examples:

        sedac ctl policy get --json > candidate.json     then edit it, and give it an audit share

        sedac ctl rollout start candidate.json --share 0.05 --share 0.5 --interval 60 --max-mismatch 0.05 --max-latency-ratio 1.1

        sedac ctl rollout watch

        sedac ctl rollout abort --comment "seen enough" --wait 5
    """,
)
Name = Annotated[str, typer.Argument(help="Its number; left out: the one under way.", autocompletion=complete_rollout)]
_BOUNDS = "Bounds: what the candidate must not pass"


@app.command("start")
@connected
def start(
    client: ControlClient,
    file: Annotated[Path | None, typer.Argument(help="The candidate, as `policy get --json` prints one; - reads standard input.")] = None,
    revision: Annotated[
        int | None, typer.Option(help="Instead of a file: the revision whose content is the candidate.", autocompletion=complete_revision)
    ] = None,
    share: Annotated[list[float] | None, typer.Option(help="Of the requests, over 0 to 1; repeated and ascending; default: 0.05 0.25 0.5.")] = None,
    interval: Annotated[float | None, typer.Option(help="Seconds between two analyses; default: 60.")] = None,
    min_requests: Annotated[int | None, typer.Option(help="In each step before a verdict; default: 100.")] = None,
    max_mismatch: Annotated[
        float | None, typer.Option(help="Of its audited answers, 0 to 1; needs an audit share in it.", rich_help_panel=_BOUNDS)
    ] = None,
    max_nll_difference: Annotated[
        float | None, typer.Option(help="Of its audited answers, nats per token; as above.", rich_help_panel=_BOUNDS)
    ] = None,
    max_latency_ratio: Annotated[
        float | None, typer.Option(help="Of its seconds per token to those of the policy in force.", rich_help_panel=_BOUNDS)
    ] = None,
    max_error_share: Annotated[float | None, typer.Option(help="Of its finished requests, 0 to 1.", rich_help_panel=_BOUNDS)] = None,
    confidence: Annotated[float | None, typer.Option(help="Of the verdicts, 0.5 to below 1; default: 0.95.", rich_help_panel=_BOUNDS)] = None,
    comment: Comment = "",
    wait: Wait = 0.0,
    as_json: AsJson = False,
) -> None:
    """Start one; refused while another is under way. --wait: until every engine runs the candidate beside the policy in force."""
    if (file is None) == (revision is None):
        raise typer.BadParameter("give a candidate: a file, or --revision NUMBER, and not both")
    knobs: Any = {
        "shares": share,
        "interval_seconds": interval,
        "min_requests": min_requests,
        "max_mismatch": max_mismatch,
        "max_nll_difference": max_nll_difference,
        "max_latency_ratio": max_latency_ratio,
        "max_error_share": max_error_share,
        "confidence": confidence,
    }
    candidate = wire.policy_from_proto(read_policy_file(file)) if file else revision or 0
    given: Any = {name: value for name, value in knobs.items() if value is not None}
    _finish(client, client.start_rollout(candidate, comment=comment, **given), wait, as_json)


@app.command("show")
@connected
def show_rollout(client: ControlClient, name: Name = "", as_json: AsJson = False) -> None:
    """Show the one under way, or the newest, with both sides at its last analysis."""
    show(client.get_rollout(name), as_json, rollout_tables.make_rollout)


@app.command("list")
@connected
def list_rollouts(client: ControlClient, limit: Limit = 50, as_json: AsJson = False) -> None:
    """List roll-outs, newest first."""
    show_list(islice(client.list_rollouts(), limit), as_json, rollout_tables.make_rollouts_table)


@app.command("promote")
@connected
def promote(client: ControlClient, name: Name = "", comment: Comment = "", wait: Wait = 0.0, as_json: AsJson = False) -> None:
    """Make the candidate the policy in force now, whatever the analysis says."""
    _finish(client, client.promote_rollout(name, comment=comment), wait, as_json)


@app.command("pause")
@connected
def pause(client: ControlClient, name: Name = "", comment: Comment = "", wait: Wait = 0.0, as_json: AsJson = False) -> None:
    """Keep the share as it is and stop the analysis."""
    _finish(client, client.pause_rollout(name, comment=comment), wait, as_json)


@app.command("resume")
@connected
def resume(client: ControlClient, name: Name = "", comment: Comment = "", wait: Wait = 0.0, as_json: AsJson = False) -> None:
    """Go on from the same share with a new interval."""
    _finish(client, client.resume_rollout(name, comment=comment), wait, as_json)


@app.command("abort")
@connected
def abort(client: ControlClient, name: Name = "", comment: Comment = "", wait: Wait = 0.0, as_json: AsJson = False) -> None:
    """Give all requests back to the policy in force."""
    _finish(client, client.abort_rollout(name, comment=comment), wait, as_json)


@app.command("watch")
@connected
def watch(
    client: ControlClient,
    name: Name = "",
    interval: Annotated[float, typer.Option(min=0.05, help="Seconds between two looks.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Show the one under way, or the newest, whenever it changes, until it is promoted or aborted, or Ctrl-C."""
    show_events(client.watch_rollout(name, interval), as_json, _make_lines)


def _make_lines(rollout: rollouts_pb2.Rollout) -> RenderableType:
    share = f"{rollout_tables.get_share(rollout):.1%}"
    line = Text(f"{format_time(rollout, 'update_time')}  roll-out {rollout.number}  {rollout_tables.get_state(rollout)}  {share}")
    line.append(f"  {rollout.reason}" if rollout.reason else "")
    return Group(line, rollout_tables.make_evidence_table(rollout.evidence)) if rollout.evidence else line


def _finish(client: ControlClient, rollout: rollouts_pb2.Rollout, wait: float, as_json: bool) -> None:
    """Show a changed roll-out and wait until every engine knows: its candidate where it is under way, else nobody's."""
    show(rollout, as_json, rollout_tables.make_rollout)
    if wait:
        is_over = rollout.state in ENDED
        client.wait_until_synced(rollout.promoted_revision or rollout.base_revision, wait, rollout=0 if is_over else rollout.number)
