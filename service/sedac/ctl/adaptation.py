"""`sedac ctl adaptation`: thresholds that follow target exit rates."""

from __future__ import annotations

from typing import Any

import typer

from sedac.client.client import ControlClient
from sedac.ctl.engine_tables import make_adaptation
from sedac.ctl.knobs import change_policy, list_part_options, with_knobs
from sedac.ctl.options import AsJson, Comment, DryRun, Wait
from sedac.ctl.session import change, connected, read_in_force, show
from sedac.policy.knob import list_fields
from sedac.policy.model import MAX_GENERATION, Policy

(_ADAPTATION,) = (field for field in list_fields(Policy) if field.name == "adaptation")
app = typer.Typer(
    no_args_is_help=True,
    help="""Thresholds that follow target exit rates: show, freeze, thaw, reset, set.

    Examples:

        sedac ctl adaptation set --adaptive --exit-rate all=0.3 --wait 5

        sedac ctl adaptation show

        sedac ctl adaptation freeze --comment "keep the night's thresholds"
    """,
)


@app.command("show")
@connected
def show_adaptation(client: ControlClient, as_json: AsJson = False) -> None:
    """Show the knobs, and for every engine the adapted thresholds and exit rates beside their targets."""
    show(client.get_status(), as_json, make_adaptation)


@app.command("freeze")
@connected
def freeze(client: ControlClient, comment: Comment = "", wait: Wait = 0.0, as_json: AsJson = False) -> None:
    """Keep the thresholds as they are now."""
    _change(client, {"adaptation.frozen": True}, comment=comment, wait=wait, as_json=as_json)


@app.command("thaw")
@connected
def thaw(client: ControlClient, comment: Comment = "", wait: Wait = 0.0, as_json: AsJson = False) -> None:
    """Let frozen thresholds follow the traffic again."""
    _change(client, {"adaptation.frozen": False}, comment=comment, wait=wait, as_json=as_json)


@app.command("reset")
@connected
def reset(client: ControlClient, comment: Comment = "", wait: Wait = 0.0, as_json: AsJson = False) -> None:
    """Forget what was learned and start again from the policy's thresholds, with a new warm-up."""
    policy, etag = read_in_force(client)
    changed, fields = change_policy(policy, {"adaptation.generation": policy.adaptation.generation % MAX_GENERATION + 1})
    change(client, changed, fields, etag=etag, comment=comment, validate_only=False, wait=wait, as_json=as_json)


@app.command("set")
@connected
@with_knobs(list_part_options(_ADAPTATION))
def set_adaptation(
    client: ControlClient, knobs: dict[str, Any], comment: Comment = "", validate_only: DryRun = False, wait: Wait = 0.0, as_json: AsJson = False
) -> None:
    """Change some knobs of adaptation; the others stay.

    Examples:

        sedac ctl adaptation set --adaptive --exit-rate 5=0.2 --exit-rate 8=0.4 --wait 5

        sedac ctl adaptation set --alpha 0.05 --window-tokens 8192     steadier

        sedac ctl adaptation set --fixed     back to the policy's thresholds
    """
    _change(client, knobs, comment=comment, validate_only=validate_only, wait=wait, as_json=as_json)


def _change(client: ControlClient, knobs: dict[str, Any], *, validate_only: bool = False, **ending: Any) -> None:
    policy, etag = read_in_force(client)
    changed, fields = change_policy(policy, knobs)
    if not fields:
        raise typer.BadParameter("nothing to change: give at least one knob, such as --exit-rate all=0.3")
    change(client, changed, fields, etag=etag, validate_only=validate_only, **ending)
