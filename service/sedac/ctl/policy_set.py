"""`sedac ctl policy set`: every knob of the policy in force by an option of its own."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import typer

from sedac.client.client import ControlClient
from sedac.ctl.adaptation import change_adaptation
from sedac.ctl.completion import complete_probe_set, complete_tier
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
    parse_number_or,
)
from sedac.ctl.session import change, connected, read_in_force
from sedac.ctl.speculation_options import DraftAdaptive, DraftConfidence, DraftTiers, DraftTokens, Speculate, change_speculation
from sedac.policy.model import Checkpoint, Policy

_CHECKPOINTS, _DECISION, _TIERS = "Checkpoints: after which layers a probe reads the stream", "Decision", "Tiers"
_AUDIT = "Audit: answers scored again in full, and the guard"

app = typer.Typer()


@app.command("set")
@connected
def set_policy(
    client: ControlClient,
    enabled: Annotated[bool | None, typer.Option("--enabled/--disabled", help="Disabled: every request exact, as plain vLLM.")] = None,
    probe_set: Annotated[
        str | None, typer.Option(help="Name of the probe set; empty: the one the engine started with.", autocompletion=complete_probe_set)
    ] = None,
    threshold: Annotated[
        list[str] | None,
        typer.Option(
            help="LAYER=VALUE or all=VALUE; may be repeated. Risk below it counts as confident; 0 turns a checkpoint off, a new LAYER adds one.",
            rich_help_panel=_CHECKPOINTS,
        ),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(help="LAYER=VALUE or all=VALUE: this checkpoint's part in the confidence of rule accumulate.", rich_help_panel=_CHECKPOINTS),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="LAYER=VALUE or all=VALUE: accumulated confidence from which on a token exits.", rich_help_panel=_CHECKPOINTS),
    ] = None,
    rule: Annotated[
        Literal["first", "accumulate", "single"] | None,
        typer.Option(
            help="first: exit at the first confident checkpoint. accumulate: confidence adds up. single: one checkpoint decides.",
            rich_help_panel=_DECISION,
        ),
    ] = None,
    decay: Annotated[
        float | None, typer.Option(help="0 to 1: what confidence keeps from one checkpoint to the next, rule accumulate.", rich_help_panel=_DECISION)
    ] = None,
    phase: Annotated[
        Literal["decode", "all"] | None,
        typer.Option(help="Which tokens may be reduced: generated ones, or the prompt's too.", rich_help_panel=_DECISION),
    ] = None,
    scope: Annotated[
        Literal["token", "batch"] | None, typer.Option(help="Tokens exit one by one, or only all of a batch together.", rich_help_panel=_DECISION)
    ] = None,
    sensitivity: Annotated[
        float | None,
        typer.Option(help="0 to 10: how much a prompt riskier than the mean lowers its request's thresholds; 0: off.", rich_help_panel=_DECISION),
    ] = None,
    default_tier: Annotated[
        str | None,
        typer.Option(help="Tier of requests that name none; `exact` makes reducing opt-in.", rich_help_panel=_TIERS, autocompletion=complete_tier),
    ] = None,
    allow_overrides: Annotated[
        bool | None,
        typer.Option(
            "--allow-overrides/--refuse-overrides",
            help="Whether a request may bring its own sedac_level or sedac_threshold_scale.",
            rich_help_panel=_TIERS,
        ),
    ] = None,
    soft_exit: Annotated[
        bool | None,
        typer.Option("--soft-exit/--hard-exit", help="In every tier: less the more confident; needs --rule accumulate.", rich_help_panel=_TIERS),
    ] = None,
    adaptive: Adaptive = None,
    frozen: Frozen = None,
    exit_rate: ExitRates = None,
    alpha: Alpha = None,
    warmup_steps: WarmupSteps = None,
    window_tokens: WindowTokens = None,
    min_threshold: MinThreshold = None,
    max_threshold: MaxThreshold = None,
    audit_share: Annotated[
        float | None,
        typer.Option(help="0 to 1: share of the bounded requests that is scored again in full; 0: none.", rich_help_panel=_AUDIT),
    ] = None,
    max_mismatch: Annotated[
        str | None,
        typer.Option(help="Guard: share of tokens that the full model would not choose, 0 to 1; none: not guarded.", rich_help_panel=_AUDIT),
    ] = None,
    max_nll_difference: Annotated[
        str | None,
        typer.Option(help="Guard: what tokens lose in log-probability, mean in nats, 0 to 1; none: not guarded.", rich_help_panel=_AUDIT),
    ] = None,
    audit_confidence: Annotated[
        float | None, typer.Option(help="0.5 to below 1: of the limits that the guard holds against its bounds.", rich_help_panel=_AUDIT)
    ] = None,
    guard: Annotated[
        Literal["rollback", "exact"] | None,
        typer.Option(help="On a breach: rollback to the last good revision, or exact, the same policy disabled.", rich_help_panel=_AUDIT),
    ] = None,
    speculation: Speculate = None,
    draft_tokens: DraftTokens = None,
    draft_confidence: DraftConfidence = None,
    draft_adaptive: DraftAdaptive = None,
    draft_tier: DraftTiers = None,
    comment: Comment = "",
    validate_only: DryRun = False,
    wait: Wait = 0.0,
    as_json: AsJson = False,
) -> None:
    """Change some knobs of the policy in force; the others stay. Guarded against other writers.

    Single tiers are changed by `sedac ctl tier`.

    Examples:

        sedac ctl policy set --threshold 5=0.4 --threshold 8=0.6 --wait 5

        sedac ctl policy set --threshold all=0 --comment "stop exits, keep watching"

        sedac ctl policy set --rule accumulate --decay 0.9 --weight 5=0.4 --weight 8=0.6 --target all=0.5 --soft-exit

        sedac ctl policy set --adaptive --exit-rate all=0.3 --wait 5

        sedac ctl policy set --audit-share 0.01 --max-mismatch 0.05 --guard rollback

        sedac ctl policy set --draft-tokens 3 --draft-fixed --draft-tier exact

        sedac ctl policy set --default-tier exact

        sedac ctl policy set --disabled
    """
    policy, etag = read_in_force(client)
    plain = {
        "enabled": enabled,
        "probe_set": probe_set,
        "rule": rule,
        "decay": decay,
        "phase": phase,
        "scope": scope,
        "sensitivity": sensitivity,
        "default_tier": default_tier,
        "allow_overrides": allow_overrides,
    }
    changes: dict[str, Any] = {name: value for name, value in plain.items() if value is not None}
    if threshold or weight or target:
        changes["checkpoints"] = _merge_checkpoints(policy.checkpoints, threshold or [], weight or [], target or [])
    if soft_exit is not None:
        changes["tiers"] = tuple(dataclasses.replace(tier, soft_exit=soft_exit) for tier in policy.get_tiers())
    changed, fields = change_adaptation(
        dataclasses.replace(policy, **changes),
        exit_rate,
        enabled=adaptive,
        frozen=frozen,
        alpha=alpha,
        warmup_steps=warmup_steps,
        window_tokens=window_tokens,
        min_threshold=min_threshold,
        max_threshold=max_threshold,
    )
    changed, audit_fields = _change_audit(
        changed, share=audit_share, confidence=audit_confidence, action=guard, max_mismatch=max_mismatch, max_nll_difference=max_nll_difference
    )
    changed, draft_fields = change_speculation(
        changed, draft_tier, draft_confidence, enabled=speculation, max_tokens=draft_tokens, adaptive=draft_adaptive
    )
    fields = [*sorted(changes), *fields, *audit_fields, *draft_fields]
    if not fields:
        raise typer.BadParameter("nothing to change: give at least one knob, such as --threshold 5=0.4")
    change(client, changed, fields, etag=etag, comment=comment, validate_only=validate_only, wait=wait, as_json=as_json)


def _merge_checkpoints(checkpoints: tuple[Checkpoint, ...], threshold: list[str], weight: list[str], target: list[str]) -> tuple[Checkpoint, ...]:
    thresholds = merge_by_layer("--threshold", {c.layer: c.threshold for c in checkpoints}, threshold)
    known = {c.layer: c for c in checkpoints}
    merged = {layer: dataclasses.replace(known.get(layer, Checkpoint(layer=layer, threshold=t)), threshold=t) for layer, t in thresholds.items()}
    for option, name, given in (("--weight", "weight", weight), ("--target", "target", target)):
        for layer, value in merge_by_layer(option, {layer: getattr(c, name) for layer, c in merged.items()}, given).items():
            if layer not in merged:
                raise typer.BadParameter(f"{option}: layer {layer} is no checkpoint of the policy; add it with --threshold {layer}=VALUE")
            knob: dict[str, Any] = {name: value}
            merged[layer] = dataclasses.replace(merged[layer], **knob)
    return tuple(merged[layer] for layer in sorted(merged))


def _change_audit(policy: Policy, max_mismatch: str | None, max_nll_difference: str | None, **knobs: Any) -> tuple[Policy, list[str]]:
    changes: dict[str, Any] = {name: value for name, value in knobs.items() if value is not None}
    for name, text in (("max_mismatch", max_mismatch), ("max_nll_difference", max_nll_difference)):
        if text is not None:
            changes[name] = parse_number_or("none", f"--{name.replace('_', '-')}", text)
    return dataclasses.replace(policy, audit=dataclasses.replace(policy.audit, **changes)), [f"audit.{name}" for name in sorted(changes)]
