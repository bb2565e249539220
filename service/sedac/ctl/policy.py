"""`sedac ctl policy`: the policy in force, as a whole; policy_set.py has its knobs, revisions.py its history."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from sedac.client.client import ControlClient
from sedac.contract import wire
from sedac.ctl import policy_set as policy_set_ctl
from sedac.ctl import revisions as revisions_ctl
from sedac.ctl.completion import complete_revision
from sedac.ctl.options import AsJson, Comment, DryRun, Wait, read_policy_file
from sedac.ctl.policy_tables import make_policy_table
from sedac.ctl.session import change, connected, show

app = typer.Typer(
    no_args_is_help=True,
    help="""Read and change the policy; every change is a revision.

    Examples:

        sedac ctl policy get

        sedac ctl policy set --threshold 5=0.4 --comment "fewer exits" --wait 5

        sedac ctl policy diff 3 5

        sedac ctl policy rollback 3 --wait 5
    """,
)


@app.command("get")
@connected
def get_policy(
    client: ControlClient,
    as_json: AsJson = False,
    revision: Annotated[int, typer.Option(help="0: the one in force.", autocompletion=complete_revision)] = 0,
) -> None:
    """Show the policy in force, or an older revision."""
    show(client.get_policy(revision), as_json, make_policy_table)


app.add_typer(policy_set_ctl.app)


@app.command("apply")
@connected
def apply_policy(
    client: ControlClient,
    file: Annotated[Path, typer.Argument(help="A policy as JSON, as `policy get --json` prints it; - reads standard input.")],
    comment: Comment = "",
    validate_only: DryRun = False,
    wait: Wait = 0.0,
    as_json: AsJson = False,
    force: Annotated[bool, typer.Option("--force", help="Leave out the file's certificate, so that it need not fit: UNCERTIFIED.")] = False,
) -> None:
    """Make a whole policy from a file the one in force; knobs that the file leaves out get their defaults.

    An etag in the file guards against changes made since it was read; leave it out to apply the file whatever is in force.

    A file with a certificate (`sedac-probes certify` writes one) is refused where the knobs, or an attached engine's weights or probe set,
    are not the ones that were certified.

    Examples:

        sedac ctl policy get --json > policy.json     then edit it

        sedac ctl policy apply policy.json --comment "new thresholds" --wait 5

        sedac ctl policy apply build/certificate/policy.json --wait 5
    """
    message = read_policy_file(file)
    policy = wire.policy_from_proto(message)
    if force and policy.certificate:
        typer.echo(f"sedac: applied UNCERTIFIED, without the file's certificate ({policy.certificate.describe()})", err=True)
        policy = dataclasses.replace(policy, certificate=None)
    note = comment or message.comment
    change(client, policy, (), etag=message.etag, comment=note, validate_only=validate_only, wait=wait, as_json=as_json)


app.add_typer(revisions_ctl.app)
