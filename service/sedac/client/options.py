"""What the commands of `sedac ctl` share: their options, the connection with its exit codes, and how a change ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import typer
from google.protobuf import json_format
from google.protobuf.message import Message
from rich.console import Console, RenderableType

from sedac import wire
from sedac.client import tables
from sedac.client.client import ControlClient
from sedac.control.v1 import control_pb2
from sedac.errors import ControlUnavailable, NotSynced, PolicyInvalid, SedacError
from sedac.policy import Policy

Address = Annotated[str, typer.Option(envvar="SEDAC_CONTROL_ADDRESS", help="host:port of the control service.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Comment = Annotated[str, typer.Option(help="Why; kept with the revision.")]
Wait = Annotated[float, typer.Option(help="Seconds to wait until every engine runs the new revision; 0: don't wait.")]
DryRun = Annotated[bool, typer.Option(help="Check against the attached engines and change nothing.")]

_ADAPTATION = "Adaptation"
Adaptive = Annotated[
    bool | None, typer.Option("--adaptive/--fixed", help="Whether thresholds follow target exit rates.", rich_help_panel=_ADAPTATION)
]
Frozen = Annotated[bool | None, typer.Option("--frozen/--thawed", help="Keep the adapted thresholds as they are.", rich_help_panel=_ADAPTATION)]
ExitRates = Annotated[
    list[str] | None,
    typer.Option(
        "--exit-rate", help="LAYER=RATE or all=RATE, 0 to 1: share of the tokens evaluated there that shall exit.", rich_help_panel=_ADAPTATION
    ),
]
Alpha = Annotated[
    float | None, typer.Option(help="Over 0 to 1: how fast thresholds move; 0.1 averages about ten steps.", rich_help_panel=_ADAPTATION)
]
WarmupSteps = Annotated[int | None, typer.Option(help="Steps with evaluated tokens before the first change.", rich_help_panel=_ADAPTATION)]
WindowTokens = Annotated[
    int | None, typer.Option(help="64 to 65536: risks remembered per checkpoint; more is steadier and slower.", rich_help_panel=_ADAPTATION)
]
MinThreshold = Annotated[float | None, typer.Option(help="Adapted thresholds stay at or above it.", rich_help_panel=_ADAPTATION)]
MaxThreshold = Annotated[float | None, typer.Option(help="Adapted thresholds stay at or below it.", rich_help_panel=_ADAPTATION)]


@contextlib.contextmanager
def connect(address: str) -> Iterator[ControlClient]:
    """Open a client; an error of SEDAC's ends the command with one line and its exit code."""
    try:
        with ControlClient(address) as client:
            yield client
    except SedacError as error:
        violations = error.violations if isinstance(error, PolicyInvalid) else ()
        typer.echo("\n  ".join(["sedac: policy refused:", *map(str, violations)]) if len(violations) > 1 else f"sedac: {error}", err=True)
        raise typer.Exit(4 if isinstance(error, ControlUnavailable) else 3 if isinstance(error, NotSynced) else 1) from None


def to_json(message: Message, indent: int | None = 2) -> str:
    """Write a message as JSON with the contract's field names, zeros included."""
    return str(json_format.MessageToJson(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True, indent=indent))


def show(message: Message, as_json: bool, render: Callable[[Any], RenderableType]) -> None:
    """Print a message as JSON or as what `render` makes of it."""
    if as_json:
        typer.echo(to_json(message))
    else:
        Console().print(render(message))


def read_in_force(client: ControlClient) -> tuple[Policy, str]:
    """Return the policy in force and its etag, which guards a change against other writers."""
    current = client.get_policy()
    return wire.policy_from_proto(current), current.etag


def change(
    client: ControlClient, policy: Policy, fields: Sequence[str], *, etag: str, comment: str, validate_only: bool, wait: float, as_json: bool
) -> None:
    """Make `fields` of `policy` a new revision and show it; waits for the engines where asked to."""
    made = client.update_policy(policy, fields=fields, etag=etag, comment=comment, validate_only=validate_only)
    finish(client, made, 0.0 if validate_only else wait, as_json)


def finish(client: ControlClient, made: control_pb2.Policy, wait: float, as_json: bool) -> None:
    """Show a new revision and wait until every engine runs it, at most `wait` seconds; 0: don't wait."""
    show(made, as_json, tables.make_policy_table)
    if wait:
        client.wait_until_synced(made.revision, wait)


def merge_by_layer(option: str, values: dict[int, float], given: Sequence[str]) -> dict[int, float]:
    """Return `values` with the LAYER=VALUE and all=VALUE of an option put in."""
    merged = dict(values)
    for item in given:
        layer, _, value = item.partition("=")
        try:
            layers = list(merged) if layer == "all" else [int(layer)]
            merged |= dict.fromkeys(layers, float(value))
        except ValueError:
            raise typer.BadParameter(f"{option} {item!r}: give LAYER=VALUE or all=VALUE, such as 5=0.4") from None
    return merged
