"""`sedac ctl policy`: every knob of the policy in force, and its revisions."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from google.protobuf import json_format
from rich.console import Console

from sedac import wire
from sedac.client import tables
from sedac.client.adaptation_ctl import change_adaptation
from sedac.client.client import DEFAULT_ADDRESS
from sedac.client.options import (
    Adaptive,
    Address,
    Alpha,
    AsJson,
    Comment,
    DryRun,
    ExitRates,
    Frozen,
    MaxThreshold,
    MinThreshold,
    Wait,
    WarmupSteps,
    WindowTokens,
    change,
    connect,
    finish,
    merge_by_layer,
    read_in_force,
    show,
    to_json,
)
from sedac.control.v1 import control_pb2
from sedac.policy import Checkpoint, Policy

_CHECKPOINTS, _DECISION, _TIERS = "Checkpoints: after which layers a probe reads the stream", "Decision", "Tiers"

app = typer.Typer(no_args_is_help=True, help="Read and change the policy; every change is a revision.")


@app.command("get")
def get_policy(
    address: Address = DEFAULT_ADDRESS, as_json: AsJson = False, revision: Annotated[int, typer.Option(help="0: the one in force.")] = 0
) -> None:
    """Show the policy in force, or an older revision."""
    with connect(address) as client:
        show(client.get_policy(revision), as_json, tables.make_policy_table)


@app.command("revisions")
def list_revisions(address: Address = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """List all revisions, newest first."""
    with connect(address) as client:
        revisions = list(client.list_revisions())
        if as_json:
            typer.echo("[" + ",\n".join(to_json(r) for r in revisions) + "]")
        else:
            Console().print(tables.make_revisions_table(revisions))


@app.command("set")
def set_policy(
    address: Address = DEFAULT_ADDRESS,
    enabled: Annotated[bool | None, typer.Option("--enabled/--disabled", help="Disabled: every request exact, as plain vLLM.")] = None,
    probe_set: Annotated[str | None, typer.Option(help="Name of the probe set; empty: the one the engine started with.")] = None,
    threshold: Annotated[
        list[str] | None,
        typer.Option(
            help="LAYER=VALUE or all=VALUE; may be repeated. Risk below it counts as confident; 0 turns a checkpoint off, a new LAYER adds one.",
            rich_help_panel=_CHECKPOINTS,
        ),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(help="LAYER=VALUE or all=VALUE: this checkpoint's part in the confidence of rule accumulate.", rich_help_panel=_CHECKPOINTS),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="LAYER=VALUE or all=VALUE: accumulated confidence from which on a token exits.", rich_help_panel=_CHECKPOINTS),
    ] = None,
    rule: Annotated[
        Literal["first", "accumulate", "single"] | None,
        typer.Option(
            help="first: exit at the first confident checkpoint. accumulate: confidence adds up. single: one checkpoint decides.",
            rich_help_panel=_DECISION,
        ),
    ] = None,
    decay: Annotated[
        float | None, typer.Option(help="0 to 1: what confidence keeps from one checkpoint to the next, rule accumulate.", rich_help_panel=_DECISION)
    ] = None,
    phase: Annotated[
        Literal["decode", "all"] | None,
        typer.Option(help="Which tokens may be reduced: generated ones, or the prompt's too.", rich_help_panel=_DECISION),
    ] = None,
    scope: Annotated[
        Literal["token", "batch"] | None, typer.Option(help="Tokens exit one by one, or only all of a batch together.", rich_help_panel=_DECISION)
    ] = None,
    sensitivity: Annotated[
        float | None,
        typer.Option(help="0 to 10: how much a prompt riskier than the mean lowers its request's thresholds; 0: off.", rich_help_panel=_DECISION),
    ] = None,
    default_tier: Annotated[
        str | None, typer.Option(help="Tier of requests that name none; `exact` makes reducing opt-in.", rich_help_panel=_TIERS)
    ] = None,
    allow_overrides: Annotated[
        bool | None,
        typer.Option(
            "--allow-overrides/--refuse-overrides",
            help="Whether a request may bring its own sedac_level or sedac_threshold_scale.",
            rich_help_panel=_TIERS,
        ),
    ] = None,
    soft_exit: Annotated[
        bool | None,
        typer.Option("--soft-exit/--hard-exit", help="In every tier: less the more confident; needs --rule accumulate.", rich_help_panel=_TIERS),
    ] = None,
    adaptive: Adaptive = None,
    frozen: Frozen = None,
    exit_rate: ExitRates = None,
    alpha: Alpha = None,
    warmup_steps: WarmupSteps = None,
    window_tokens: WindowTokens = None,
    min_threshold: MinThreshold = None,
    max_threshold: MaxThreshold = None,
    comment: Comment = "",
    validate_only: DryRun = False,
    wait: Wait = 0.0,
    as_json: AsJson = False,
) -> None:
    """Change some knobs of the policy in force; the others stay. Guarded against other writers.

    Single tiers are changed by `sedac ctl tier`.

    Examples:

        sedac ctl policy set --threshold 5=0.4 --threshold 8=0.6 --wait 5

        sedac ctl policy set --threshold all=0 --comment "stop exits, keep watching"

        sedac ctl policy set --rule accumulate --decay 0.9 --weight 5=0.4 --weight 8=0.6 --target all=0.5 --soft-exit

        sedac ctl policy set --adaptive --exit-rate all=0.3 --wait 5

        sedac ctl policy set --default-tier exact

        sedac ctl policy set --disabled
    """
    with connect(address) as client:
        policy, etag = read_in_force(client)
        plain = {
            "enabled": enabled,
            "probe_set": probe_set,
            "rule": rule,
            "decay": decay,
            "phase": phase,
            "scope": scope,
            "sensitivity": sensitivity,
            "default_tier": default_tier,
            "allow_overrides": allow_overrides,
        }
        changes: dict[str, Any] = {name: value for name, value in plain.items() if value is not None}
        if threshold or weight or target:
            changes["checkpoints"] = _merge_checkpoints(policy.checkpoints, threshold or [], weight or [], target or [])
        if soft_exit is not None:
            changes["tiers"] = tuple(dataclasses.replace(tier, soft_exit=soft_exit) for tier in policy.get_tiers())
        changed, fields = change_adaptation(
            dataclasses.replace(policy, **changes),
            exit_rate,
            enabled=adaptive,
            frozen=frozen,
            alpha=alpha,
            warmup_steps=warmup_steps,
            window_tokens=window_tokens,
            min_threshold=min_threshold,
            max_threshold=max_threshold,
        )
        fields = [*sorted(changes), *fields]
        if not fields:
            raise typer.BadParameter("nothing to change: give at least one knob, such as --threshold 5=0.4")
        change(client, changed, fields, etag=etag, comment=comment, validate_only=validate_only, wait=wait, as_json=as_json)


@app.command("apply")
def apply_policy(
    file: Annotated[Path, typer.Argument(help="A policy as JSON, as `policy get --json` prints it; - reads standard input.")],
    address: Address = DEFAULT_ADDRESS,
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
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        message = json_format.Parse(text, control_pb2.Policy())
    except (OSError, UnicodeDecodeError, json_format.ParseError) as error:
        raise typer.BadParameter(f"{file} can't be read as a policy: {error}") from None
    with connect(address) as client:
        policy: Policy = wire.policy_from_proto(message)
        if force and policy.certificate:
            typer.echo(f"sedac: applied UNCERTIFIED, without the file's certificate ({policy.certificate.describe()})", err=True)
            policy = dataclasses.replace(policy, certificate=None)
        note = comment or message.comment
        change(client, policy, (), etag=message.etag, comment=note, validate_only=validate_only, wait=wait, as_json=as_json)


@app.command("rollback")
def rollback_policy(
    revision: Annotated[int, typer.Argument(help="The revision whose content comes back.")],
    address: Address = DEFAULT_ADDRESS,
    comment: Comment = "",
    wait: Wait = 0.0,
    as_json: AsJson = False,
) -> None:
    """Make the content of an older revision the newest one; numbers only grow."""
    with connect(address) as client:
        finish(client, client.rollback(revision, comment=comment), wait, as_json)


def _merge_checkpoints(checkpoints: tuple[Checkpoint, ...], threshold: list[str], weight: list[str], target: list[str]) -> tuple[Checkpoint, ...]:
    thresholds = merge_by_layer("--threshold", {c.layer: c.threshold for c in checkpoints}, threshold)
    known = {c.layer: c for c in checkpoints}
    merged = {layer: dataclasses.replace(known.get(layer, Checkpoint(layer=layer, threshold=t)), threshold=t) for layer, t in thresholds.items()}
    for option, name, given in (("--weight", "weight", weight), ("--target", "target", target)):
        for layer, value in merge_by_layer(option, {layer: getattr(c, name) for layer, c in merged.items()}, given).items():
            if layer not in merged:
                raise typer.BadParameter(f"{option}: layer {layer} is no checkpoint of the policy; add it with --threshold {layer}=VALUE")
            knob: dict[str, Any] = {name: value}
            merged[layer] = dataclasses.replace(merged[layer], **knob)
    return tuple(merged[layer] for layer in sorted(merged))
