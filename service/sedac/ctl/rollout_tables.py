"""Tables of roll-outs, of what was measured of their sides, and of the guard."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sedac.contract.v1 import control_pb2, evidence_pb2, rollouts_pb2
from sedac.ctl.cells import format_estimate, format_milliseconds, format_time, name_enum

_STYLES = {"PROGRESSING": "cyan", "PAUSED": "yellow", "PROMOTED": "green", "ABORTED": "red"}
_BOUNDS = {
    "max_mismatch": "mismatch",
    "max_nll_difference": "NLL difference",
    "max_latency_ratio": "latency ratio",
    "max_error_share": "errors",
}


def get_state(rollout: rollouts_pb2.Rollout) -> str:
    """Return a roll-out's state in a word."""
    return name_enum(rollouts_pb2.RolloutState, rollout.state, "ROLLOUT_STATE_")


def get_share(rollout: rollouts_pb2.Rollout) -> float:
    """Return the share of the requests that the candidate has now, or had when it ended."""
    return rollout.shares[rollout.step] if rollout.step < len(rollout.shares) else 0.0


def make_rollout_table(rollout: rollouts_pb2.Rollout) -> Table:
    """Show one roll-out, a row per fact."""
    state, table = get_state(rollout), Table(show_header=False, box=None)
    table.add_row("roll-out", f"{rollout.number}  (etag {rollout.etag})")
    table.add_row("state", Text(state, style=_STYLES.get(state, "")) + Text(f"  {rollout.reason}" if rollout.reason else "", style="default"))
    steps = "  ".join(f"[bold]{share:.4g}[/]" if i == rollout.step else f"{share:.4g}" for i, share in enumerate(rollout.shares))
    table.add_row("share", f"{get_share(rollout):.1%} of the requests, step {rollout.step + 1} of {len(rollout.shares)}: {steps}")
    table.add_row("analysis", f"every {rollout.interval_seconds:g} s, from {rollout.min_requests} requests in a step on")
    bounds = [f"{name} <= {getattr(rollout.bounds, field):g}" for field, name in _BOUNDS.items() if rollout.bounds.HasField(field)]
    confidence = f" at {rollout.bounds.confidence:g}" if bounds and rollout.bounds.HasField("confidence") else ""
    table.add_row("bounds", f"{', '.join(bounds)}{confidence}" if bounds else "none")
    became = f", became revision {rollout.promoted_revision}" if rollout.promoted_revision else ""
    table.add_row("base", f"revision {rollout.base_revision}{became}")
    note = f": {rollout.comment}" if rollout.comment else ""
    table.add_row("made", escape(f"{format_time(rollout, 'create_time')} by {rollout.author or '-'}{note}"))
    return table


def make_rollout(rollout: rollouts_pb2.Rollout) -> RenderableType:
    """Show one roll-out and both sides at its last analysis."""
    table = make_rollout_table(rollout)
    return Group(table, Text(), make_evidence_table(rollout.evidence)) if rollout.evidence else table


def make_rollouts_table(rollouts: Iterable[rollouts_pb2.Rollout]) -> Table:
    """Show roll-outs, newest first."""
    table = Table("roll-out", "state", "share", "base", "became", "changed", "author", "reason", "comment", box=None)
    for r in rollouts:
        state = get_state(r)
        words = (r.author, r.reason, r.comment)
        became = str(r.promoted_revision or "-")
        styled, share = Text(state, style=_STYLES.get(state, "")), f"{get_share(r):.1%}"
        table.add_row(str(r.number), styled, share, str(r.base_revision), became, format_time(r, "update_time"), *map(escape, words))
    return table


def make_evidence_table(evidence: Iterable[evidence_pb2.TierEvidence]) -> Table:
    """Show what was measured of each side's tiers; of audits the mean between its confidence limits, and the number of requests."""
    table = Table("side", "tier", "requests", "errors", "mismatch", "NLL difference", "first token", "per token", box=None)
    for e in evidence:
        table.add_row(
            "candidate" if e.side == evidence_pb2.SIDE_CANDIDATE else "stable",
            escape(e.tier),
            str(e.num_requests),
            str(e.num_errors),
            format_estimate(e.mismatch),
            format_estimate(e.nll_difference),
            format_milliseconds(e.mean_first_token_seconds),
            format_milliseconds(e.mean_token_seconds),
        )
    return table


def make_guard(guard: control_pb2.Guard) -> Text:
    """Say what the guard last did."""
    act = f"took revision {guard.refused_revision} out of force, made {guard.revision}"
    return Text(f"guard: {format_time(guard, 'act_time')} {act}: {guard.reason}", style="red")
