"""Tables of policies: one revision, all revisions, tiers, changes."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sedac.client.diff import Change
from sedac.contract import wire
from sedac.contract.mapping import read
from sedac.contract.v1 import control_pb2
from sedac.ctl.cells import format_time, name_enum
from sedac.policy.knob import list_fields, list_knobs
from sedac.policy.model import Policy, Speculation

_DESCRIBED = frozenset(
    {
        *("enabled", "probe_set", "phase", "scope", "rule", "decay", "strict", "sensitivity", "default_tier", "allow_overrides"),
        *(f"adaptation.{name}" for name in ("enabled", "frozen", "target_exit_rates", "alpha", "warmup_steps", "window_tokens", "generation")),
        *(f"audit.{name}" for name in ("share", "max_mismatch", "max_nll_difference", "confidence", "action")),
        *(f"speculation.{name}" for name in ("enabled", "max_tokens", "min_confidence", "adaptive", "tiers")),
    }
)
"""Knobs that a row of the table puts into words. Any other gets a row of its own where its value is not the default."""
_AUDIT_BOUNDS = (("max_mismatch", "mismatch"), ("max_nll_difference", "NLL difference"))


def make_policy_table(policy: control_pb2.Policy) -> Table:
    """Show one revision, a row per knob."""
    table = Table(show_header=False, box=None)
    table.add_row("revision", f"{policy.revision}  (etag {policy.etag})")
    created = format_time(policy, "revision_create_time", "not stored")
    table.add_row("made", escape(f"{created} by {policy.author or '-'}" + (f": {policy.comment}" if policy.comment else "")))
    table.add_row("enabled", "[green]yes[/]" if policy.enabled else "[yellow]no: every token in full[/]")
    table.add_row("probe set", escape(policy.probe_set) or "the one the engine started with")
    thresholds = "  ".join(f"{c.layer}: {c.threshold:g}" for c in policy.checkpoints)
    table.add_row("thresholds", f"{thresholds or 'none'}  (layer: risk below it is confident)")
    rule = name_enum(control_pb2.Rule, policy.rule, "RULE_").lower()
    if policy.rule == control_pb2.RULE_ACCUMULATE:
        table.add_row("weights", "  ".join(f"{c.layer}: {c.weight:g}" for c in policy.checkpoints))
        table.add_row("targets", "  ".join(f"{c.layer}: {c.target:g}" for c in policy.checkpoints))
        rule += f", decay {policy.decay:g}"
    table.add_row("rule", rule)
    table.add_row("phase", name_enum(control_pb2.Phase, policy.phase, "PHASE_").lower())
    table.add_row("scope", name_enum(control_pb2.Scope, policy.scope, "SCOPE_").lower())
    table.add_row("levels", "strict: every token at its very level" if policy.strict else "at least: in full where that is not slower")
    table.add_row("sensitivity", f"{policy.sensitivity:g}" if policy.sensitivity else "0: every prompt alike")
    tiers = ["exact", *(_describe_tier(tier) for tier in policy.tiers or [control_pb2.Tier(name="balanced", threshold_scale=1)])]
    table.add_row("tiers", escape("\n".join(tiers)))
    table.add_row("default tier", escape(policy.default_tier))
    table.add_row("overrides", "allowed" if policy.allow_overrides else "refused")
    table.add_row("adaptation", describe_adaptation(policy))
    table.add_row("certificate", _describe_certificate(policy))
    table.add_row("audit", _describe_audit(policy.audit))
    table.add_row("speculation", escape(_describe_speculation(wire.speculation_from_proto(policy.speculation))))
    for path, value in _list_other_knobs(policy):
        table.add_row(path.replace("_", " ").replace(".", " "), escape(str(value)))
    return table


def _list_other_knobs(policy: control_pb2.Policy) -> Iterator[tuple[str, object]]:
    """Yield the knobs that no row above speaks of, with their values, where these are not the usual ones."""
    known = read(Policy, policy, [])
    whole = {field.name for field in list_fields(Policy) if field.is_part and (field.is_list or field.is_optional)}
    for path, field in list_knobs(Policy):
        if path in _DESCRIBED or field.is_part or path.partition(".")[0] in whole:
            continue
        value = operator.attrgetter(path)(known)
        if value != field.default:
            yield path, value


def _describe_certificate(policy: control_pb2.Policy) -> str:
    if not policy.HasField("certificate"):
        return "[yellow]UNCERTIFIED[/]"
    return f"[green]CERTIFIED[/]  {escape(wire.certificate_from_proto(policy.certificate).describe())}"


def _describe_audit(audit: control_pb2.Audit) -> str:
    if not audit.share:
        return "off: no answer is scored again"
    bounds = [f"{name} <= {getattr(audit, field):g}" for field, name in _AUDIT_BOUNDS if audit.HasField(field)]
    if not bounds:
        return f"{audit.share:.1%} of the bounded requests; not guarded"
    act = "to exact" if audit.action == control_pb2.GUARD_ACTION_EXACT else "back to the last good revision"
    return f"{audit.share:.1%} of the bounded requests; guard: {', '.join(bounds)} at {audit.confidence:g}, else {act}"


def _describe_speculation(knobs: Speculation) -> str:
    if not knobs.enabled:
        return "off: nothing is drafted"
    length = f"up to {knobs.max_tokens} tokens" if knobs.max_tokens else "as many tokens as the draft proposes"
    stop = "the draft's own confidence" if knobs.min_confidence is None else f"confidence {knobs.min_confidence:g}"
    return f"on, {'adaptive' if knobs.adaptive else 'fixed'}: {length}, down to {stop}, for {', '.join(knobs.tiers) or 'every tier'}"


def _describe_tier(tier: control_pb2.Tier) -> str:
    exits = "softly to" if tier.soft_exit else "to"
    return f"{tier.name}: {tier.floor or 'full'}, confident tokens {exits} {tier.level or 'skip'}, thresholds x {tier.threshold_scale:g}"


def describe_adaptation(policy: control_pb2.Policy) -> str:
    """Say in one line what adaptation does."""
    knobs = policy.adaptation
    if not knobs.enabled:
        return "off"
    targets = "  ".join(f"{c.layer}: {rate:g}" for c, rate in zip(policy.checkpoints, knobs.target_exit_rates, strict=False))
    pace = f"alpha {knobs.alpha:g}, window {knobs.window_tokens} tokens, warm-up {knobs.warmup_steps} steps"
    return f"{'[yellow]frozen[/]' if knobs.frozen else 'on'}, target exit rates {targets}  ({pace}, generation {knobs.generation})"


def make_revisions_table(policies: Iterable[control_pb2.Policy]) -> Table:
    """Show revisions, newest first."""
    table = Table("revision", "made", "author", "enabled", "thresholds", "default tier", "certified", "comment", box=None)
    for p in policies:
        thresholds = " ".join(f"{c.layer}:{c.threshold:g}" for c in p.checkpoints)
        made = format_time(p, "revision_create_time")
        enabled, certified = "yes" if p.enabled else "no", escape(p.certificate.tier) if p.HasField("certificate") else "-"
        table.add_row(str(p.revision), made, escape(p.author), enabled, thresholds, escape(p.default_tier), certified, escape(p.comment))
    return table


def make_tiers(status: control_pb2.Status) -> RenderableType:
    """Show the tiers of the policy in force, and the levels that every engine has."""
    policy = status.policy
    table = Table("tier", "every token", "confident tokens", "thresholds", "exit", "", box=None)
    table.add_row("exact", "full", "full", "-", "-", "default" if policy.default_tier == "exact" else "")
    for tier in policy.tiers or [control_pb2.Tier(name="balanced", threshold_scale=1)]:
        default = "default" if policy.default_tier == tier.name else ""
        exits = "soft" if tier.soft_exit else "hard"
        table.add_row(escape(tier.name), escape(tier.floor or "full"), escape(tier.level or "skip"), f"x {tier.threshold_scale:g}", exits, default)
    levels = [Text(f"levels of {e.engine.engine_id}: {', '.join(e.engine.levels or ('full', 'skip'))}") for e in status.engines]
    return Group(table, *levels)


def make_changes_table(changes: Iterable[Change]) -> RenderableType:
    """Show what differs, a row per field."""
    table = Table("field", "before", "after", box=None)
    for change in changes:
        table.add_row(escape(change.field), Text(_show_value(change.before), "red"), Text(_show_value(change.after), "green"))
    return table if table.row_count else Text("no difference")


def _show_value(value: object) -> str:
    return "-" if value is None else str(value)
