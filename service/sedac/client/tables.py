"""What `sedac ctl` prints: tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sedac import wire
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
    table.add_row("thresholds", f"{thresholds or 'none'}  (layer: risk below it is confident)")
    rule = name_enum(control_pb2.Rule, policy.rule, "RULE_").lower()
    if policy.rule == control_pb2.RULE_ACCUMULATE:
        table.add_row("weights", "  ".join(f"{c.layer}: {c.weight:g}" for c in policy.checkpoints))
        table.add_row("targets", "  ".join(f"{c.layer}: {c.target:g}" for c in policy.checkpoints))
        rule += f", decay {policy.decay:g}"
    table.add_row("rule", rule)
    table.add_row("phase", name_enum(control_pb2.Phase, policy.phase, "PHASE_").lower())
    table.add_row("scope", name_enum(control_pb2.Scope, policy.scope, "SCOPE_").lower())
    table.add_row("sensitivity", f"{policy.sensitivity:g}" if policy.sensitivity else "0: every prompt alike")
    tiers = ["exact", *(_describe_tier(tier) for tier in policy.tiers or [control_pb2.Tier(name="balanced", threshold_scale=1)])]
    table.add_row("tiers", escape("\n".join(tiers)))
    table.add_row("default tier", escape(policy.default_tier))
    table.add_row("overrides", "allowed" if policy.allow_overrides else "refused")
    table.add_row("adaptation", _describe_adaptation(policy))
    table.add_row("certificate", _describe_certificate(policy))
    return table


def _describe_certificate(policy: control_pb2.Policy) -> str:
    if not policy.HasField("certificate"):
        return "[yellow]UNCERTIFIED[/]"
    return f"[green]CERTIFIED[/]  {escape(wire.certificate_from_proto(policy.certificate).describe())}"


def _describe_tier(tier: control_pb2.Tier) -> str:
    exits = "softly to" if tier.soft_exit else "to"
    return f"{tier.name}: {tier.floor or 'full'}, confident tokens {exits} {tier.level or 'skip'}, thresholds x {tier.threshold_scale:g}"


def _describe_adaptation(policy: control_pb2.Policy) -> str:
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
        made = p.revision_create_time.ToDatetime().strftime("%Y-%m-%d %H:%M:%S")
        enabled, certified = "yes" if p.enabled else "no", escape(p.certificate.tier) if p.HasField("certificate") else "-"
        table.add_row(str(p.revision), made, escape(p.author), enabled, thresholds, escape(p.default_tier), certified, escape(p.comment))
    return table


def make_engines_table(engines: Iterable[control_pb2.EngineStatus], before: control_pb2.Status | None = None) -> Table:
    """Show every engine: state, revisions, exit rate per checkpoint, share of MLP work saved.

    Rates are of everything since the engine started, or since the status `before`.
    """
    table = Table("engine", "state", "revision", "model", "exit rate by checkpoint", "MLP work saved", "steps", box=None)
    for e, last in _pair(engines, before):
        state = name_enum(control_pb2.EngineState, e.state, "ENGINE_STATE_")
        rates, saved = _make_rates(e.report, last)
        revision = str(e.active_revision) if e.active_revision == e.desired_revision else f"{e.active_revision} (wanted {e.desired_revision})"
        styled = Text(state, style=_STATE_STYLES.get(state, ""))
        table.add_row(escape(e.engine.engine_id), styled, revision, escape(e.engine.model), rates, saved, str(e.report.num_steps))
        if e.error.message:
            table.add_row("", Text(e.error.message, style="red"))
    return table


def _pair(
    engines: Iterable[control_pb2.EngineStatus], before: control_pb2.Status | None
) -> Iterator[tuple[control_pb2.EngineStatus, control_pb2.EngineReport]]:
    """Yield every engine with its earlier report; an empty one where there is none, or the engine started again in between."""
    earlier = {e.engine.engine_id: e.report for e in before.engines} if before else {}
    for e in engines:
        last = earlier.get(e.engine.engine_id, control_pb2.EngineReport())
        yield e, last if last.num_steps <= e.report.num_steps else control_pb2.EngineReport()


def _make_rates(now: control_pb2.EngineReport, last: control_pb2.EngineReport) -> tuple[str, str]:
    exited = {c.layer: c.num_exited for c in last.checkpoints}
    allowed = now.num_decode_tokens - last.num_decode_tokens
    rates = "  ".join(f"{c.layer}: {(c.num_exited - exited.get(c.layer, 0)) / allowed:.1%}" for c in now.checkpoints) if allowed > 0 else ""
    skipped = now.num_mlp_blocks_skipped - last.num_mlp_blocks_skipped
    blocks = skipped + now.num_mlp_blocks_computed - last.num_mlp_blocks_computed
    return rates or "-", f"{skipped / blocks:.1%}" if blocks > 0 else "-"


def make_checkpoints_table(status: control_pb2.Status) -> Table:
    """Show every engine's checkpoints: the threshold in force beside the policy's, the exit rate of late beside its target."""
    table = Table("engine", "checkpoint", "threshold in force", "policy's", "exit rate of late", "target", "evaluated", "exited", box=None)
    policy = {c.layer: c.threshold for c in status.policy.checkpoints}
    adaptation = status.policy.adaptation
    rates = zip(policy, adaptation.target_exit_rates, strict=False) if adaptation.enabled else ()
    targets = dict(rates)
    for e in status.engines:
        for c in e.report.checkpoints:
            table.add_row(
                escape(e.engine.engine_id),
                str(c.layer),
                f"{c.threshold:g}",
                f"{policy[c.layer]:g}" if c.layer in policy else "-",
                f"{c.exit_rate:.1%}" if c.num_evaluated else "-",
                f"{targets[c.layer]:.1%}" if c.layer in targets else "-",
                str(c.num_evaluated),
                str(c.num_exited),
            )
    return table


def make_tier_work_table(engines: Iterable[control_pb2.EngineStatus], before: control_pb2.Status | None = None) -> Table:
    """Show what each tier's requests cost: tokens, share of their MLP work computed, exit rate; since the start or since `before`."""
    table = Table("engine", "tier", "tokens", "MLP work computed", "exit rate", box=None)
    for e, last in _pair(engines, before):
        earlier = {t.name: t for t in last.tiers}
        for t in e.report.tiers:
            old = earlier.get(t.name, control_pb2.TierReport())
            tokens, work = t.num_tokens - old.num_tokens, (t.num_tokens - old.num_tokens) * e.engine.num_layers
            share = f"{(t.num_mlp_blocks_computed - old.num_mlp_blocks_computed) / work:.1%}" if work > 0 else "-"
            rate = f"{(t.num_exited - old.num_exited) / tokens:.1%}" if tokens > 0 else "-"
            table.add_row(escape(e.engine.engine_id), escape(t.name), str(tokens), share, rate)
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


def make_adaptation(status: control_pb2.Status) -> RenderableType:
    """Show adaptation: its knobs, and every engine's thresholds and exit rates."""
    counts = [Text(f"changes in {e.engine.engine_id} since the last reset: {e.report.num_adaptations}") for e in status.engines]
    return Group(Text.from_markup(_describe_adaptation(status.policy)), *counts, Text(), make_checkpoints_table(status))


def make_status(status: control_pb2.Status, before: control_pb2.Status | None = None) -> Group:
    """Show the desired policy and all engines, with rates since the status `before` where one is given."""
    policy = make_policy_table(status.policy) if status.HasField("policy") else Text("no policy yet: no engine has connected")
    parts: list[RenderableType] = [policy, Text()]
    parts.append(make_engines_table(status.engines, before) if status.engines else Text("no engine has connected"))
    if any(e.report.checkpoints for e in status.engines):
        parts += [Text(), make_checkpoints_table(status)]
    if any(e.report.tiers for e in status.engines):
        parts += [Text(), make_tier_work_table(status.engines, before)]
    return Group(*parts)
