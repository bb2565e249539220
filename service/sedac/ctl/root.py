"""Read and change the policy in force, roll it out, upload probe sets, watch engines.

Exit codes: 0 done, 1 refused, 2 wrong usage, 3 not in force on every engine, 4 control service unreachable,
5 not allowed (not authenticated, or not by this role).

Examples:

    sedac ctl status

    sedac ctl policy set --threshold 5=0.4 --comment "fewer exits" --wait 5

    sedac ctl probe-set upload build/mine/probe-set

    sedac ctl rollout start candidate.json --share 0.05 --share 0.5 --max-mismatch 0.05

    sedac ctl status --address control.internal:50051 --ca ca.pem --token-file token
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

from sedac.client.client import ControlClient
from sedac.contract.v1 import control_pb2
from sedac.ctl import adaptation as adaptation_ctl
from sedac.ctl import audit as audit_ctl
from sedac.ctl import engines as engine_ctl
from sedac.ctl import policy as policy_ctl
from sedac.ctl import probe_sets as probe_set_ctl
from sedac.ctl import rollouts as rollout_ctl
from sedac.ctl import tables
from sedac.ctl import tiers as tier_ctl
from sedac.ctl.options import AsJson
from sedac.ctl.session import connected, show, to_json

_RATE_WINDOW_SECONDS = 10.0

app = typer.Typer(no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
for _group, _name in (
    (policy_ctl, "policy"),
    (tier_ctl, "tier"),
    (adaptation_ctl, "adaptation"),
    (probe_set_ctl, "probe-set"),
    (rollout_ctl, "rollout"),
    (engine_ctl, "engine"),
    (audit_ctl, "audit"),
):
    app.add_typer(_group.app, name=_name)


@app.command()
@connected
def status(client: ControlClient, as_json: AsJson = False) -> None:
    """Show the policy in force, the roll-out, what audits found, and every engine: tiers, thresholds, exit rates, MLP work."""
    show(client.get_status(), as_json, tables.make_status)


@app.command()
@connected
def watch(client: ControlClient, as_json: AsJson = False, interval: Annotated[float, typer.Option(help="Seconds, 0.1 to 60.")] = 1.0) -> None:
    """Show the status as it changes, until Ctrl-C; with --json one line per change.

    Rates are those of the last ten seconds, so that the effect of a changed knob shows; `status` has those since the start.
    """
    with contextlib.suppress(KeyboardInterrupt):
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
