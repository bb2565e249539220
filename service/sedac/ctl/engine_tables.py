"""Tables of engines: their states, checkpoints and what tiers cost there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sedac.contract import wire
from sedac.contract.stats import ControllerStats, DraftingStats
from sedac.contract.v1 import control_pb2
from sedac.ctl.cells import format_share, format_time, name_enum
from sedac.ctl.policy_tables import describe_adaptation

_STATE_STYLES = {"SYNCED": "green", "PENDING": "yellow", "NACKED": "red", "STALE": "red"}


def make_engines_table(engines: Iterable[control_pb2.EngineStatus], before: control_pb2.Status | None = None) -> Table:
    """Show every engine: state, revisions, exit rate per checkpoint, share of MLP work saved.

    Rates are of everything since the engine started, or since the status `before`.
    """
    table = Table("engine", "state", "revision", "model", "SEDAC", "exit rate by checkpoint", "MLP work saved", "steps", box=None)
    for e, last in _pair(engines, before):
        rates, saved = _make_rates(e.report, last)
        revision = str(e.active_revision) if e.active_revision == e.desired_revision else f"{e.active_revision} (wanted {e.desired_revision})"
        words = (revision, e.engine.model, e.engine.sedac_version or "-", rates, saved, str(e.report.num_steps))
        table.add_row(escape(e.engine.engine_id), make_state(get_state(e)), *map(escape, words))
        if e.active_rollout:
            table.add_row("", "", Text(f"+ roll-out {e.active_rollout}", style="cyan"))
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


def make_fleet_table(engines: Iterable[control_pb2.EngineStatus]) -> Table:
    """Show every engine: state, revisions, what it runs, how it drafts, its data-parallel ranks, when it was last heard of."""
    table = Table("engine", "state", "revision", "roll-out", "model", "probe set", "draft", "vLLM", "SEDAC", "ranks", "last seen", box=None)
    for e in engines:
        hello, state = e.engine, get_state(e)
        ranks = " ".join(f"{r.rank}:{r.active_revision}" for r in e.report.ranks) or str(hello.data_parallel_size or 1)
        revision = str(e.active_revision) if e.active_revision == e.desired_revision else f"{e.active_revision} (wanted {e.desired_revision})"
        draft = _describe_draft(e)
        words = (revision, str(e.active_rollout or "-"), hello.model, hello.probe_set, draft, hello.vllm_version, hello.sedac_version, ranks)
        table.add_row(escape(hello.engine_id), make_state(state), *map(escape, words), format_time(e, "last_seen_time"))
        if e.error.message:
            table.add_row("", Text(e.error.message, style="red"))
    return table


def _describe_draft(engine: control_pb2.EngineStatus) -> str:
    drafting = wire.drafting_from_proto(engine.report.drafting)
    if not drafting.num_drafted:
        return drafting.kind or engine.engine.draft or "-"
    return f"{drafting.kind}: AR {format_share(drafting.acceptance_rate)}, {drafting.tokens_per_step:.2f} tokens/step"


def make_drafting_table(engines: Iterable[control_pb2.EngineStatus], before: control_pb2.Status | None = None) -> Table:
    """Show how every engine with a draft of its own speculates, since the start or since `before`; the controller's state is that of now.

    AR: accepted / verified draft tokens; TRR: accepted draft tokens / output tokens. Tokens per step are a sequence's, in all steps.
    """
    titles = ("AR", "TRR", "tokens/step", "draft length", "accepted by position", "time drafting", "controller by batch size: state, gain")
    table = Table("engine", "draft", *titles, box=None)
    for e, last in _pair(engines, before):
        if not e.report.HasField("drafting"):
            continue
        now = wire.drafting_from_proto(e.report.drafting)
        new = now.since(wire.drafting_from_proto(last.drafting) if last.HasField("drafting") else None)
        numbers = ("-" if math.isnan(n) else f"{n:.2f}" for n in (new.tokens_per_step, new.mean_length))
        table.add_row(
            escape(e.engine.engine_id),
            escape(now.kind),
            format_share(new.acceptance_rate),
            format_share(new.token_ratio),
            *numbers,
            _describe_positions(new),
            format_share(new.draft_share),
            "\n".join(map(_describe_controller, now.controller)) or "-",
        )
    return table


def _describe_positions(drafting: DraftingStats) -> str:
    pairs = zip(drafting.accepted_at, drafting.drafted_at, strict=False)
    return " ".join(f"{accepted / drafted:.0%}" for accepted, drafted in pairs if drafted) or "-"


def _describe_controller(size: ControllerStats) -> str:
    return f"{size.num_sequences}: {size.state}" + (f" {size.gain:.2f}x" if size.gain else "")


def get_state(engine: control_pb2.EngineStatus) -> str:
    """Return an engine's state in a word."""
    return name_enum(control_pb2.EngineState, engine.state, "ENGINE_STATE_")


def make_state(state: str) -> Text:
    """Return a state in its colour."""
    return Text(state, style=_STATE_STYLES.get(state, ""))


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


def make_adaptation(status: control_pb2.Status) -> RenderableType:
    """Show adaptation: its knobs, and every engine's thresholds and exit rates."""
    counts = [Text(f"changes in {e.engine.engine_id} since the last reset: {e.report.num_adaptations}") for e in status.engines]
    return Group(Text.from_markup(describe_adaptation(status.policy)), *counts, Text(), make_checkpoints_table(status))
