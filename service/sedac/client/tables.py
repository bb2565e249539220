"""What `sedac ctl` prints: tables for people."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sedac.control.v1 import control_pb2

_STATE_STYLES = {"SYNCED": "green", "PENDING": "yellow", "NACKED": "red", "STALE": "red"}


def name_enum(enum: object, number: int, prefix: str) -> str:
    """Return an enum value's name without its prefix."""
    return str(enum.Name(number)).removeprefix(prefix)  # type: ignore[attr-defined]


def make_policy_table(policy: control_pb2.Policy) -> Table:
    """Show one revision, a row per knob."""
    table = Table(show_header=False, box=None)
    table.add_row("revision", f"{policy.revision}  (etag {policy.etag})")
    created = policy.revision_create_time.ToDatetime().strftime("%Y-%m-%d %H:%M:%S UTC") if policy.HasField("revision_create_time") else "not stored"
    table.add_row("made", escape(f"{created} by {policy.author or '-'}" + (f": {policy.comment}" if policy.comment else "")))
    table.add_row("enabled", "[green]yes[/]" if policy.enabled else "[yellow]no: every token in full[/]")
    table.add_row("probe set", escape(policy.probe_set) or "the one the engine started with")
    thresholds = "  ".join(f"{c.layer}: {c.threshold:g}" for c in policy.checkpoints)
    table.add_row("thresholds", f"{thresholds or 'none'}  (layer: risk below it exits)")
    table.add_row("phase", name_enum(control_pb2.Phase, policy.phase, "PHASE_").lower())
    table.add_row("scope", name_enum(control_pb2.Scope, policy.scope, "SCOPE_").lower())
    return table


def make_revisions_table(policies: Iterable[control_pb2.Policy]) -> Table:
    """Show revisions, newest first."""
    table = Table("revision", "made", "author", "enabled", "thresholds", "comment", box=None)
    for p in policies:
        thresholds = " ".join(f"{c.layer}:{c.threshold:g}" for c in p.checkpoints)
        made = p.revision_create_time.ToDatetime().strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(str(p.revision), made, escape(p.author), "yes" if p.enabled else "no", thresholds, escape(p.comment))
    return table


def make_engines_table(engines: Iterable[control_pb2.EngineStatus], before: control_pb2.Status | None = None) -> Table:
    """Show every engine: state, revisions, exit rate per checkpoint, share of MLP blocks skipped.

    Rates are of everything since the engine started, or since the status `before`.
    """
    table = Table("engine", "state", "revision", "model", "exit rate by checkpoint", "MLPs skipped", "steps", box=None)
    earlier = {e.engine.engine_id: e.report for e in before.engines} if before else {}
    for e in engines:
        state = name_enum(control_pb2.EngineState, e.state, "ENGINE_STATE_")
        last = earlier.get(e.engine.engine_id, control_pb2.EngineReport())
        rates, skipped = _make_rates(e.report, last if last.num_steps <= e.report.num_steps else control_pb2.EngineReport())
        revision = str(e.active_revision) if e.active_revision == e.desired_revision else f"{e.active_revision} (wanted {e.desired_revision})"
        styled = Text(state, style=_STATE_STYLES.get(state, ""))
        table.add_row(escape(e.engine.engine_id), styled, revision, escape(e.engine.model), rates, skipped, str(e.report.num_steps))
        if e.error.message:
            table.add_row("", Text(e.error.message, style="red"))
    return table


def _make_rates(now: control_pb2.EngineReport, last: control_pb2.EngineReport) -> tuple[str, str]:
    exited = {c.layer: c.num_exited for c in last.checkpoints}
    allowed = now.num_decode_tokens - last.num_decode_tokens
    rates = "  ".join(f"{c.layer}: {(c.num_exited - exited.get(c.layer, 0)) / allowed:.1%}" for c in now.checkpoints) if allowed > 0 else ""
    skipped = now.num_mlp_blocks_skipped - last.num_mlp_blocks_skipped
    blocks = skipped + now.num_mlp_blocks_computed - last.num_mlp_blocks_computed
    return rates or "-", f"{skipped / blocks:.1%}" if blocks > 0 else "-"


def make_status(status: control_pb2.Status, before: control_pb2.Status | None = None) -> Group:
    """Show the desired policy and all engines, with rates since the status `before` where one is given."""
    policy = make_policy_table(status.policy) if status.HasField("policy") else Text("no policy yet: no engine has connected")
    engines = make_engines_table(status.engines, before) if status.engines else Text("no engine has connected")
    return Group(policy, Text(), engines)
