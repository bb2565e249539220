"""What every command of `sedac ctl` goes through: its connection and the options of that, its exit code, and how answers are shown."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from google.protobuf import json_format
from google.protobuf.message import Message
from rich.console import Console, RenderableType

from sedac.client.client import DEFAULT_ADDRESS, ControlClient
from sedac.contract import wire
from sedac.contract.credentials import read_credentials
from sedac.contract.v1 import control_pb2
from sedac.ctl.policy_tables import make_policy_table
from sedac.errors import ConfigError, ControlUnavailable, NotSynced, PermissionDenied, PolicyInvalid, SedacError, Unauthenticated
from sedac.policy.model import Policy

_CODES: tuple[tuple[type[SedacError], int], ...] = (
    (ConfigError, 2),
    (NotSynced, 3),
    (ControlUnavailable, 4),
    (Unauthenticated, 5),
    (PermissionDenied, 5),
)
_PANEL = "Connection, the same for every command"


def _make_parameter(name: str, kind: Any, default: Any, help_: str, *flags: str, variable: str) -> inspect.Parameter:
    option = typer.Option(*flags, envvar=f"SEDAC_CONTROL_{variable}", help=help_, rich_help_panel=_PANEL)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


_CONNECTION = (
    _make_parameter("address", str, DEFAULT_ADDRESS, "host:port of the control service.", "--address", variable="ADDRESS"),
    _make_parameter("tls", bool | None, None, "Speak TLS; on where a CA or a certificate is named.", "--tls/--no-tls", variable="TLS"),
    _make_parameter("ca", Path | None, None, "PEM file of the authorities that may have signed the service's certificate.", "--ca", variable="CA"),
    _make_parameter("client_cert", Path | None, None, "PEM file of your certificate (mTLS).", "--cert", variable="CLIENT_CERT"),
    _make_parameter("client_key", Path | None, None, "PEM file of its key.", "--key", variable="CLIENT_KEY"),
    _make_parameter("server_name", str, "", "Name that the service's certificate must carry.", "--server-name", variable="SERVER_NAME"),
    _make_parameter("token_file", Path | None, None, "File with your bearer token.", "--token-file", variable="TOKEN_FILE"),
)

CONNECTION_NAMES = tuple(parameter.name for parameter in _CONNECTION)
"""Names of the connection's options, as commands know them."""


def connected(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command its client as first argument: adds the connection's options to its own, opens it, turns errors into exit codes."""

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        """Open a client by the connection's options, and call the command with it."""
        options = {name: arguments.pop(name) for name in CONNECTION_NAMES}
        with exiting(), open_client(options) as client:
            command(client, **arguments)

    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    parameters = [*(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own), *_CONNECTION]
    run.__dict__["__signature__"] = inspect.Signature(parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def open_client(options: dict[str, Any], **habits: Any) -> ControlClient:
    """Open a client from the values of the connection's options; what is not given comes from the environment.

    Raises:
        ConfigError: the credentials don't fit each other or can't be read.
    """
    given = {name: value for name, value in options.items() if name != "address" and value not in (None, "")}
    return ControlClient(options.get("address") or DEFAULT_ADDRESS, credentials=read_credentials(**given), **habits)


@contextlib.contextmanager
def exiting() -> Iterator[None]:
    """End the command with one line and its exit code where SEDAC raises an error."""
    try:
        yield
    except SedacError as error:
        _fail(error)


def _fail(error: SedacError) -> NoReturn:
    violations = error.violations if isinstance(error, PolicyInvalid) else ()
    typer.echo("\n  ".join(["sedac: policy refused:", *map(str, violations)]) if len(violations) > 1 else f"sedac: {error}", err=True)
    raise typer.Exit(next((code for kind, code in _CODES if isinstance(error, kind)), 1)) from None


def to_json(message: Message, indent: int | None = 2) -> str:
    """Write a message as JSON with the contract's field names, zeros included."""
    return str(json_format.MessageToJson(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True, indent=indent))


def show(message: Message, as_json: bool, render: Callable[[Any], RenderableType]) -> None:
    """Print a message as JSON or as what `render` makes of it."""
    if as_json:
        typer.echo(to_json(message))
    else:
        Console().print(render(message))


def show_list(messages: Iterable[Message], as_json: bool, render: Callable[[Any], RenderableType]) -> None:
    """Print messages as a JSON array or as what `render` makes of all of them."""
    found = list(messages)
    if as_json:
        typer.echo("[" + ",\n".join(map(to_json, found)) + "]")
    else:
        Console().print(render(found))


def show_events(messages: Iterable[Any], as_json: bool, render: Callable[[Any], RenderableType]) -> None:
    """Print messages as they come until Ctrl-C: a line of JSON each, or what `render` makes of each."""
    console = Console()
    with contextlib.suppress(KeyboardInterrupt):
        for message in messages:
            if as_json:
                typer.echo(to_json(message, indent=None))
            else:
                console.print(render(message))


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
    show(made, as_json, make_policy_table)
    if wait:
        client.wait_until_synced(made.revision, wait)
