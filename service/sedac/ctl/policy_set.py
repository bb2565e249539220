"""`sedac ctl policy set`: every knob of the policy in force by an option of its own, see knobs.py."""

from __future__ import annotations

from typing import Any

import typer

from sedac.client.client import ControlClient
from sedac.ctl.knobs import change_policy, list_policy_options, with_knobs
from sedac.ctl.options import AsJson, Comment, DryRun, Wait
from sedac.ctl.session import change, connected, read_in_force

app = typer.Typer()


@app.command("set")
@connected
@with_knobs(list_policy_options())
def set_policy(
    client: ControlClient, knobs: dict[str, Any], comment: Comment = "", validate_only: DryRun = False, wait: Wait = 0.0, as_json: AsJson = False
) -> None:
    """Change some knobs of the policy in force; the others stay. Guarded against other writers.

    Single tiers are changed by `sedac ctl tier`.

    Examples:

        sedac ctl policy set --threshold 5=0.4 --threshold 8=0.6 --wait 5

        sedac ctl policy set --threshold all=0 --comment "stop exits, keep watching"

        sedac ctl policy set --rule accumulate --decay 0.9 --weight 5=0.4 --weight 8=0.6 --target all=0.5 --soft-exit

        sedac ctl policy set --adaptive --exit-rate all=0.3 --wait 5

        sedac ctl policy set --audit-share 0.01 --max-mismatch 0.05 --guard rollback

        sedac ctl policy set --draft-tokens 3 --draft-fixed --draft-tier exact

        sedac ctl policy set --default-tier exact

        sedac ctl policy set --disabled
    """
    policy, etag = read_in_force(client)
    changed, fields = change_policy(policy, knobs)
    if not fields:
        raise typer.BadParameter("nothing to change: give at least one knob, such as --threshold 5=0.4")
    change(client, changed, fields, etag=etag, comment=comment, validate_only=validate_only, wait=wait, as_json=as_json)
