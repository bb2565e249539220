"""`sedac ctl tier`: what requests get that name a tier."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from sedac.client.client import ControlClient
from sedac.ctl.completion import complete_tier
from sedac.ctl.knobs import list_tier_options, with_knobs
from sedac.ctl.options import AsJson, Comment, DryRun, Wait
from sedac.ctl.policy_tables import make_tiers
from sedac.ctl.session import change, connected, read_in_force, show_list
from sedac.policy.model import EXACT, Policy, Tier

app = typer.Typer(
    no_args_is_help=True,
    help="""Tiers: what a request gets that names one.

    A request names it with "vllm_xargs": {"sedac_tier": NAME}. `exact`, plain vLLM, always exists and can't be changed.

    Examples:

        sedac ctl tier list

        sedac ctl tier set night --floor width-20 --level skip --threshold-scale 2 --wait 5

        sedac ctl tier default exact     reducing becomes opt-in
    """,
)
Name = Annotated[str, typer.Argument(help="1 to 32 of a-z, 0-9, - and _, a letter first.", autocompletion=complete_tier)]


@app.command("list")
@connected
def list_tiers(client: ControlClient, as_json: AsJson = False) -> None:
    """List the tiers of the policy in force, and the levels that engines have."""
    status = client.get_status()
    show_list(status.policy.tiers, as_json, lambda _: make_tiers(status))


@app.command("set")
@connected
@with_knobs(list_tier_options())
def set_tier(
    client: ControlClient,
    knobs: dict[str, Any],
    name: Name,
    comment: Comment = "",
    validate_only: DryRun = False,
    wait: Wait = 0.0,
    as_json: AsJson = False,
) -> None:
    """Change some knobs of a tier, or add a new one.

    Examples:

        sedac ctl tier set balanced --floor contextual-30 --wait 5

        sedac ctl tier set night-batch --floor width-25 --level skip --threshold-scale 2
    """
    if name == EXACT:
        raise typer.BadParameter("exact is plain vLLM and can't be changed; choose another name")
    policy, etag = read_in_force(client)
    tiers = {tier.name: tier for tier in policy.get_tiers()}
    tiers[name] = dataclasses.replace(tiers.get(name, Tier(name=name)), **knobs)
    changed = dataclasses.replace(policy, tiers=tuple(tiers.values()))
    change(client, changed, ["tiers"], etag=etag, comment=comment, validate_only=validate_only, wait=wait, as_json=as_json)


@app.command("remove")
@connected
def remove_tier(
    client: ControlClient, name: Name, comment: Comment = "", validate_only: DryRun = False, wait: Wait = 0.0, as_json: AsJson = False
) -> None:
    """Remove a tier; requests that name it are refused from then on, running ones go on under their promise."""
    policy, etag = read_in_force(client)
    changed = dataclasses.replace(policy, tiers=tuple(tier for tier in policy.get_tiers() if tier.name != name))
    if len(changed.tiers) == len(policy.get_tiers()):
        raise typer.BadParameter(f"{name!r} is no tier of the policy; it has {_list_names(policy)}")
    if not changed.tiers:
        raise typer.BadParameter("the last tier can't be removed, for no list means one tier `balanced`; use `sedac ctl tier default exact`")
    if name == policy.default_tier:
        raise typer.BadParameter(f"{name!r} is the default tier; choose another one first: sedac ctl tier default NAME")
    change(client, changed, ["tiers"], etag=etag, comment=comment, validate_only=validate_only, wait=wait, as_json=as_json)


@app.command("default")
@connected
def set_default_tier(
    client: ControlClient, name: Name, comment: Comment = "", validate_only: DryRun = False, wait: Wait = 0.0, as_json: AsJson = False
) -> None:
    """Choose the tier of requests that name none; `exact` makes reducing opt-in."""
    policy, etag = read_in_force(client)
    changed = dataclasses.replace(policy, default_tier=name)
    change(client, changed, ["default_tier"], etag=etag, comment=comment, validate_only=validate_only, wait=wait, as_json=as_json)


def _list_names(policy: Policy) -> str:
    return ", ".join(tier.name for tier in policy.get_tiers())
