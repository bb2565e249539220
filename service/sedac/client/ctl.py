"""`sedac ctl`: read and change the policy in force, watch engines.

Exit codes: 0 done, 1 refused, 2 wrong usage, 3 not in force on every engine, 4 control service unreachable.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.live import Live

from sedac.client import adaptation_ctl, policy_ctl, tables, tier_ctl
from sedac.client.client import DEFAULT_ADDRESS
from sedac.client.options import Address, AsJson, connect, show, to_json
from sedac.control.v1 import control_pb2

_RATE_WINDOW_SECONDS = 10.0

app = typer.Typer(no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
app.add_typer(policy_ctl.app, name="policy")
app.add_typer(tier_ctl.app, name="tier")
app.add_typer(adaptation_ctl.app, name="adaptation")


@app.command()
def status(address: Address = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """Show the policy in force and every engine: tiers, thresholds in force, exit rates, MLP work."""
    with connect(address) as client:
        show(client.get_status(), as_json, tables.make_status)


@app.command()
def watch(
    address: Address = DEFAULT_ADDRESS, as_json: AsJson = False, interval: Annotated[float, typer.Option(help="Seconds, 0.1 to 60.")] = 1.0
) -> None:
    """Show the status as it changes, until Ctrl-C; with --json one line per change.

    Rates are those of the last ten seconds, so that the effect of a changed knob shows; `status` has those since the start.
    """
    with connect(address) as client, contextlib.suppress(KeyboardInterrupt):
        if as_json:
            for update in client.watch_status(interval):
                typer.echo(to_json(update, indent=None))
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
