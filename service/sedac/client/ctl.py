"""`sedac ctl`: read and change the policy in force, watch engines.

Exit codes: 0 done, 1 refused, 2 wrong usage, 3 not in force on every engine, 4 control service unreachable.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from google.protobuf import json_format
from google.protobuf.message import Message
from rich.console import Console, RenderableType
from rich.live import Live

from sedac import wire
from sedac.client import tables
from sedac.client.client import DEFAULT_ADDRESS, ControlClient
from sedac.control.v1 import control_pb2
from sedac.errors import ControlUnavailable, NotSynced, SedacError
from sedac.policy import Checkpoint, Policy

_RATE_WINDOW_SECONDS = 10.0

app = typer.Typer(no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
policy_app = typer.Typer(no_args_is_help=True, help="Read and change the policy; every change is a revision.")
app.add_typer(policy_app, name="policy")

Address = Annotated[str, typer.Option(envvar="SEDAC_CONTROL_ADDRESS", help="host:port of the control service.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Comment = Annotated[str, typer.Option(help="Why; kept with the revision.")]
Wait = Annotated[float, typer.Option(help="Seconds to wait until every engine runs the new revision; 0: don't wait.")]
DryRun = Annotated[bool, typer.Option(help="Check against the attached engines and change nothing.")]


@contextlib.contextmanager
def _connect(address: str) -> Iterator[ControlClient]:
    try:
        with ControlClient(address) as client:
            yield client
    except SedacError as error:
        typer.echo(f"sedac: {error}", err=True)
        raise typer.Exit(4 if isinstance(error, ControlUnavailable) else 3 if isinstance(error, NotSynced) else 1) from None


def _print(message: Message, as_json: bool, render: Callable[[Any], RenderableType]) -> None:
    if as_json:
        typer.echo(_to_json(message))
    else:
        Console().print(render(message))


def _to_json(message: Message, indent: int | None = 2) -> str:
    return str(json_format.MessageToJson(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True, indent=indent))


@app.command()
def status(address: Address = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """Show the policy in force and every engine."""
    with _connect(address) as client:
        _print(client.get_status(), as_json, tables.make_status)


@app.command()
def watch(
    address: Address = DEFAULT_ADDRESS, as_json: AsJson = False, interval: Annotated[float, typer.Option(help="Seconds, 0.1 to 60.")] = 1.0
) -> None:
    """Show the status as it changes, until Ctrl-C; with --json one line per change.

    Rates are those of the last ten seconds, so that the effect of a changed knob shows; `status` has those since the start.
    """
    with _connect(address) as client, contextlib.suppress(KeyboardInterrupt):
        if as_json:
            for update in client.watch_status(interval):
                typer.echo(_to_json(update, indent=None))
        else:
            with Live(auto_refresh=False, screen=sys.stdout.isatty()) as live:
                for update, before in _pair_with_earlier(client.watch_status(interval)):
                    live.update(tables.make_status(update, before), refresh=True)


def _pair_with_earlier(updates: Iterator[control_pb2.Status]) -> Iterator[tuple[control_pb2.Status, control_pb2.Status | None]]:
    seen: deque[tuple[float, control_pb2.Status]] = deque()
    for update in updates:
        seen.append((time.monotonic(), update))
        while len(seen) > 2 and seen[1][0] <= seen[-1][0] - _RATE_WINDOW_SECONDS:
            seen.popleft()
        yield update, seen[0][1] if len(seen) > 1 else None


@policy_app.command("get")
def get_policy(
    address: Address = DEFAULT_ADDRESS, as_json: AsJson = False, revision: Annotated[int, typer.Option(help="0: the one in force.")] = 0
) -> None:
    """Show the policy in force, or an older revision."""
    with _connect(address) as client:
        _print(client.get_policy(revision), as_json, tables.make_policy_table)


@policy_app.command("revisions")
def list_revisions(address: Address = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """List all revisions, newest first."""
    with _connect(address) as client:
        revisions = list(client.list_revisions())
        if as_json:
            typer.echo("[" + ",\n".join(_to_json(r) for r in revisions) + "]")
        else:
            Console().print(tables.make_revisions_table(revisions))


@policy_app.command("set")
def set_policy(
    address: Address = DEFAULT_ADDRESS,
    enabled: Annotated[bool | None, typer.Option("--enabled/--disabled", help="Whether tokens may exit at all.")] = None,
    threshold: Annotated[list[str] | None, typer.Option(help="LAYER=VALUE, or all=VALUE; may be repeated. 0 turns a checkpoint off.")] = None,
    phase: Annotated[Literal["decode", "all"] | None, typer.Option(help="Which tokens may exit.")] = None,
    scope: Annotated[Literal["token", "batch"] | None, typer.Option(help="Tokens exit one by one, or only all together.")] = None,
    probe_set: Annotated[str | None, typer.Option(help="Name of the probe set.")] = None,
    comment: Comment = "",
    validate_only: DryRun = False,
    wait: Wait = 0.0,
    as_json: AsJson = False,
) -> None:
    """Change some knobs of the policy in force; the others stay. Guarded against other writers.

    Examples:

        sedac ctl policy set --threshold 5=0.4 --threshold 8=0.6 --wait 5

        sedac ctl policy set --threshold all=0 --comment "stop exits, keep watching"

        sedac ctl policy set --disabled
    """
    with _connect(address) as client:
        current = client.get_policy()
        policy = wire.policy_from_proto(current)
        changes: dict[str, Any] = {"enabled": enabled, "phase": phase, "scope": scope, "probe_set": probe_set}
        changes = {name: value for name, value in changes.items() if value is not None}
        if threshold:
            changes["checkpoints"] = _merge_thresholds(policy.checkpoints, threshold)
        if not changes:
            raise typer.BadParameter("nothing to change: give at least one knob, such as --threshold 5=0.4")
        changed = dataclasses.replace(policy, **changes)
        made = client.update_policy(changed, fields=sorted(changes), etag=current.etag, comment=comment, validate_only=validate_only)
        _finish(client, made, wait if not validate_only else 0.0, as_json)


@policy_app.command("apply")
def apply_policy(
    file: Annotated[Path, typer.Argument(help="A policy as JSON, as `policy get --json` prints it; - reads standard input.")],
    address: Address = DEFAULT_ADDRESS,
    comment: Comment = "",
    validate_only: DryRun = False,
    wait: Wait = 0.0,
    as_json: AsJson = False,
) -> None:
    """Make a whole policy from a file the one in force; knobs that the file leaves out get their defaults.

    An etag in the file guards against changes made since it was read; leave it out to apply the file whatever is in force.

    Examples:

        sedac ctl policy get --json > policy.json     then edit it

        sedac ctl policy apply policy.json --comment "new thresholds" --wait 5
    """
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        message = json_format.Parse(text, control_pb2.Policy())
    except (OSError, UnicodeDecodeError, json_format.ParseError) as error:
        raise typer.BadParameter(f"{file} can't be read as a policy: {error}") from None
    with _connect(address) as client:
        policy: Policy = wire.policy_from_proto(message)
        made = client.update_policy(policy, etag=message.etag, comment=comment or message.comment, validate_only=validate_only)
        _finish(client, made, wait if not validate_only else 0.0, as_json)


@policy_app.command("rollback")
def rollback_policy(
    revision: Annotated[int, typer.Argument(help="The revision whose content comes back.")],
    address: Address = DEFAULT_ADDRESS,
    comment: Comment = "",
    wait: Wait = 0.0,
    as_json: AsJson = False,
) -> None:
    """Make the content of an older revision the newest one; numbers only grow."""
    with _connect(address) as client:
        _finish(client, client.rollback(revision, comment=comment), wait, as_json)


def _finish(client: ControlClient, made: control_pb2.Policy, wait: float, as_json: bool) -> None:
    _print(made, as_json, tables.make_policy_table)
    if wait:
        client.wait_until_synced(made.revision, wait)


def _merge_thresholds(checkpoints: tuple[Checkpoint, ...], given: list[str]) -> tuple[Checkpoint, ...]:
    thresholds = {c.layer: c.threshold for c in checkpoints}
    for item in given:
        layer, _, value = item.partition("=")
        try:
            layers = list(thresholds) if layer == "all" else [int(layer)]
            thresholds |= dict.fromkeys(layers, float(value))
        except ValueError:
            raise typer.BadParameter(f"--threshold {item!r}: give LAYER=VALUE or all=VALUE, such as 5=0.4") from None
    return tuple(Checkpoint(layer=layer, threshold=t) for layer, t in sorted(thresholds.items()))
