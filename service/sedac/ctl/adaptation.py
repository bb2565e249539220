"""`sedac ctl adaptation`: thresholds that follow target exit rates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import typer

from sedac.client.client import ControlClient
from sedac.ctl.engine_tables import make_adaptation
from sedac.ctl.options import (
    Adaptive,
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
    merge_by_layer,
)
from sedac.ctl.session import change, connected, read_in_force, show
from sedac.policy.model import MAX_GENERATION, Policy

app = typer.Typer(
    no_args_is_help=True,
    help="""Thresholds that follow target exit rates: show, freeze, thaw, reset, set.

    Examples:

        sedac ctl adaptation set --adaptive --exit-rate all=0.3 --wait 5

        sedac ctl adaptation show

        sedac ctl adaptation freeze --comment "keep the night's thresholds"
    """,
)


@app.command("show")
@connected
def show_adaptation(client: ControlClient, as_json: AsJson = False) -> None:
    """Show the knobs, and for every engine the adapted thresholds and exit rates beside their targets."""
    show(client.get_status(), as_json, make_adaptation)


@app.command("freeze")
@connected
def freeze(client: ControlClient, comment: Comment = "", wait: Wait = 0.0, as_json: AsJson = False) -> None:
    """Keep the thresholds as they are now."""
    _change(client, {"frozen": True}, comment=comment, wait=wait, as_json=as_json)


@app.command("thaw")
@connected
def thaw(client: ControlClient, comment: Comment = "", wait: Wait = 0.0, as_json: AsJson = False) -> None:
    """Let frozen thresholds follow the traffic again."""
    _change(client, {"frozen": False}, comment=comment, wait=wait, as_json=as_json)


@app.command("reset")
@connected
def reset(client: ControlClient, comment: Comment = "", wait: Wait = 0.0, as_json: AsJson = False) -> None:
    """Forget what was learned and start again from the policy's thresholds, with a new warm-up."""
    policy, etag = read_in_force(client)
    changed, fields = change_adaptation(policy, None, generation=policy.adaptation.generation % MAX_GENERATION + 1)
    change(client, changed, fields, etag=etag, comment=comment, validate_only=False, wait=wait, as_json=as_json)


@app.command("set")
@connected
def set_adaptation(
    client: ControlClient,
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
    """Change some knobs of adaptation; the others stay.

    Examples:

        sedac ctl adaptation set --adaptive --exit-rate 5=0.2 --exit-rate 8=0.4 --wait 5

        sedac ctl adaptation set --alpha 0.05 --window-tokens 8192     steadier

        sedac ctl adaptation set --fixed     back to the policy's thresholds
    """
    knobs = {
        "enabled": adaptive,
        "frozen": frozen,
        "alpha": alpha,
        "warmup_steps": warmup_steps,
        "window_tokens": window_tokens,
        "min_threshold": min_threshold,
        "max_threshold": max_threshold,
    }
    _change(client, knobs, exit_rate, comment=comment, validate_only=validate_only, wait=wait, as_json=as_json)


def _change(
    client: ControlClient, knobs: dict[str, Any], exit_rates: Sequence[str] | None = None, *, validate_only: bool = False, **ending: Any
) -> None:
    policy, etag = read_in_force(client)
    changed, fields = change_adaptation(policy, exit_rates, **knobs)
    if not fields:
        raise typer.BadParameter("nothing to change: give at least one knob, such as --exit-rate all=0.3")
    change(client, changed, fields, etag=etag, validate_only=validate_only, **ending)


def change_adaptation(policy: Policy, exit_rates: Sequence[str] | None, **knobs: Any) -> tuple[Policy, list[str]]:
    """Return the policy with these knobs of adaptation, and the fields that were given; knobs of None stay as they are."""
    changes = {name: value for name, value in knobs.items() if value is not None}
    if exit_rates:
        layers = [c.layer for c in policy.checkpoints]
        rates = policy.adaptation.target_exit_rates
        known = dict(zip(layers, rates, strict=True)) if len(rates) == len(layers) else {}
        for item in exit_rates:
            if item.startswith("all="):
                known = dict.fromkeys(layers, 0.0)
            known = merge_by_layer("--exit-rate", known, [item])
        if unknown := sorted(set(known) - set(layers)):
            raise typer.BadParameter(f"--exit-rate: layer {unknown[0]} is no checkpoint; the policy has {', '.join(map(str, layers)) or 'none'}")
        if missing := [layer for layer in layers if layer not in known]:
            raise typer.BadParameter(f"--exit-rate: layer {missing[0]} has none yet; give {missing[0]}=RATE too, or all=RATE")
        changes["target_exit_rates"] = tuple(known[layer] for layer in layers)
    changed = dataclasses.replace(policy, adaptation=dataclasses.replace(policy.adaptation, **changes))
    return changed, [f"adaptation.{name}" for name in sorted(changes)]
