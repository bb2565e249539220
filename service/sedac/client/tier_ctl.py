"""`sedac ctl tier`: what requests get that name a tier."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer
from rich.console import Console

from sedac.client import tables
from sedac.client.client import DEFAULT_ADDRESS
from sedac.client.options import Address, AsJson, Comment, DryRun, Wait, change, connect, read_in_force, to_json
from sedac.policy import EXACT, Policy, Tier

app = typer.Typer(
    no_args_is_help=True,
    help='Tiers: what a request gets with "vllm_xargs": {"sedac_tier": NAME}. `exact`, plain vLLM, always exists and can\'t be changed.',
)
Name = Annotated[str, typer.Argument(help="1 to 32 of a-z, 0-9, - and _, a letter first.")]


@app.command("list")
def list_tiers(address: Address = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """List the tiers of the policy in force, and the levels that engines have."""
    with connect(address) as client:
        status = client.get_status()
        if as_json:
            typer.echo("[" + ",\n".join(to_json(tier) for tier in status.policy.tiers) + "]")
        else:
            Console().print(tables.make_tiers(status))


@app.command("set")
def set_tier(
    name: Name,
    address: Address = DEFAULT_ADDRESS,
    floor: Annotated[str | None, typer.Option(help="Level of every token that the phase allows, in all layers; new tiers: full.")] = None,
    level: Annotated[str | None, typer.Option(help="Level of confident tokens, in the layers above the checkpoint; new tiers: skip.")] = None,
    threshold_scale: Annotated[
        float | None, typer.Option(help="Multiplies every threshold; 0: no token is confident, 2: twice as many risks pass.")
    ] = None,
    soft_exit: Annotated[
        bool | None, typer.Option("--soft-exit/--hard-exit", help="Spend less the more confident, up to the level; needs rule accumulate.")
    ] = None,
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
    knobs: dict[str, Any] = {"floor": floor, "level": level, "threshold_scale": threshold_scale, "soft_exit": soft_exit}
    knobs = {knob: value for knob, value in knobs.items() if value is not None}
    with connect(address) as client:
        policy, etag = read_in_force(client)
        tiers = {tier.name: tier for tier in policy.get_tiers()}
        tiers[name] = dataclasses.replace(tiers.get(name, Tier(name=name)), **knobs)
        changed = dataclasses.replace(policy, tiers=tuple(tiers.values()))
        change(client, changed, ["tiers"], etag=etag, comment=comment, validate_only=validate_only, wait=wait, as_json=as_json)


@app.command("remove")
def remove_tier(
    name: Name, address: Address = DEFAULT_ADDRESS, comment: Comment = "", validate_only: DryRun = False, wait: Wait = 0.0, as_json: AsJson = False
) -> None:
    """Remove a tier; requests that name it are refused from then on, running ones go on under their promise."""
    with connect(address) as client:
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
def set_default_tier(
    name: Name, address: Address = DEFAULT_ADDRESS, comment: Comment = "", validate_only: DryRun = False, wait: Wait = 0.0, as_json: AsJson = False
) -> None:
    """Choose the tier of requests that name none; `exact` makes reducing opt-in."""
    with connect(address) as client:
        policy, etag = read_in_force(client)
        changed = dataclasses.replace(policy, default_tier=name)
        change(client, changed, ["default_tier"], etag=etag, comment=comment, validate_only=validate_only, wait=wait, as_json=as_json)


def _list_names(policy: Policy) -> str:
    return ", ".join(tier.name for tier in policy.get_tiers())
