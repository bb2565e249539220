"""Whether a policy may come into force: every field by itself, the fields together, and what the attached model, by its `Layout`, has room for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import MappingProxyType

from sedac.errors import FieldViolation, PolicyInvalid
from sedac.policy.certificate import Certificate, get_knobs_digest
from sedac.policy.fit import ProbeSetSummary, find_certified_digest, find_fit_problem
from sedac.policy.model import (
    EXACT,
    MAX_CHECKPOINTS,
    MAX_DRAFT_TOKENS,
    MAX_GENERATION,
    MAX_TIERS,
    SKIP,
    Audit,
    Checkpoint,
    Layout,
    Policy,
)  # fmt: skip

_MAX_LEVEL_CHARS = 64
_TIER_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")


def validate(policy: Policy, layout: Layout | None = None, available: Mapping[str, ProbeSetSummary] = MappingProxyType({})) -> None:
    """Check a policy, and against an attached model where its `layout` is given.

    It may name the probe set that the engine started with, or one of those `available` by name that fits.

    Raises:
        PolicyInvalid: with every field at fault.
    """
    bad: list[FieldViolation] = []
    for name, value, known in (
        ("phase", policy.phase, ("decode", "all")),
        ("scope", policy.scope, ("token", "batch")),
        ("rule", policy.rule, ("first", "accumulate", "single")),
    ):
        if value not in known:
            bad.append(FieldViolation(name, f"{value!r} is unknown; use {', '.join(known[:-1])} or {known[-1]}"))
    if len(policy.checkpoints) > MAX_CHECKPOINTS:
        bad.append(FieldViolation("checkpoints", f"{len(policy.checkpoints)} checkpoints; at most {MAX_CHECKPOINTS}"))
    else:
        bad += _validate_checkpoints(policy.checkpoints, layout)
    active = sum(c.threshold > 0 for c in policy.checkpoints)
    if policy.rule == "single" and active > 1:
        bad.append(
            FieldViolation("rule", f"single takes one checkpoint with a threshold over 0, {active} are given; use first, or set the others to 0")
        )
    if not 0 <= policy.decay <= 1:
        bad.append(FieldViolation("decay", f"{policy.decay} is outside 0..1; the earlier versions used 0.9"))
    if not 0 <= policy.sensitivity <= 10:
        bad.append(FieldViolation("sensitivity", f"{policy.sensitivity} is outside 0..10; 0 turns it off"))
    bad += _validate_tiers(policy, layout)
    bad += _validate_adaptation(policy)
    bad += _validate_audit(policy.audit)
    bad += _validate_speculation(policy, layout)
    named = available.get(policy.probe_set) if layout else None
    if policy.certificate:
        bad += _validate_certificate(policy, policy.certificate, layout, named)
    if layout and policy.probe_set:
        bad += _validate_probe_set(policy, layout, named)
    if bad:
        raise PolicyInvalid(bad)


def _validate_checkpoints(checkpoints: tuple[Checkpoint, ...], layout: Layout | None) -> list[FieldViolation]:
    bad: list[FieldViolation] = []
    last = -1
    for i, checkpoint in enumerate(checkpoints):
        layer, threshold = checkpoint.layer, checkpoint.threshold
        if layer < 0:
            bad.append(FieldViolation(f"checkpoints[{i}].layer", f"{layer} is negative; layers count from 0"))
        elif layer <= last:
            bad.append(FieldViolation(f"checkpoints[{i}].layer", f"{layer} follows {last}; give each layer once, in ascending order"))
        elif layout and layer not in layout.checkpoint_layers:
            attached = ", ".join(map(str, layout.checkpoint_layers)) or "none"
            bad.append(
                FieldViolation(
                    f"checkpoints[{i}].layer",
                    f"{layer} has no probe attached (attached: {attached}); restart the engine with it in SEDAC_PROBE_LAYERS",
                )
            )
        last = max(last, layer)
        if not math.isfinite(threshold) or threshold < 0:
            bad.append(FieldViolation(f"checkpoints[{i}].threshold", f"{threshold} is not a finite number >= 0; 0 turns the checkpoint off"))
        if not math.isfinite(checkpoint.weight) or checkpoint.weight < 0:
            bad.append(FieldViolation(f"checkpoints[{i}].weight", f"{checkpoint.weight} is not a finite number >= 0; 1 is neutral"))
        if not math.isfinite(checkpoint.target) or checkpoint.target <= 0:
            bad.append(FieldViolation(f"checkpoints[{i}].target", f"{checkpoint.target} is not a finite number over 0; 0.5 is usual"))
    return bad


def _validate_tiers(policy: Policy, layout: Layout | None) -> list[FieldViolation]:
    bad: list[FieldViolation] = []
    if len(policy.tiers) > MAX_TIERS:
        return [FieldViolation("tiers", f"{len(policy.tiers)} tiers; at most {MAX_TIERS}")]
    seen = {EXACT}
    for i, tier in enumerate(policy.get_tiers()):
        if not _TIER_NAME.fullmatch(tier.name):
            bad.append(FieldViolation(f"tiers[{i}].name", f"{tier.name!r}: use 1 to 32 of a-z, 0-9, - and _, a letter first"))
        elif tier.name in seen:
            reason = "always exists and can't be redefined" if tier.name == EXACT else "is listed twice"
            bad.append(FieldViolation(f"tiers[{i}].name", f"{tier.name!r} {reason}; choose another name"))
        seen.add(tier.name)
        for knob, level in (("floor", tier.floor), ("level", tier.level)):
            if not 0 < len(level) <= _MAX_LEVEL_CHARS:
                bad.append(FieldViolation(f"tiers[{i}].{knob}", f"{len(level)} characters; name a level in 1 to {_MAX_LEVEL_CHARS}"))
            elif layout and level not in layout.levels:
                bad.append(FieldViolation(f"tiers[{i}].{knob}", f"{level!r} is not a level of this engine; it has {', '.join(layout.levels)}"))
        if tier.floor == SKIP:
            bad.append(FieldViolation(f"tiers[{i}].floor", "skip would leave every token without any MLP; use full or a reduced level"))
        if not math.isfinite(tier.threshold_scale) or tier.threshold_scale < 0:
            bad.append(FieldViolation(f"tiers[{i}].threshold_scale", f"{tier.threshold_scale} is not a finite number >= 0; 1 is neutral"))
        if tier.soft_exit and policy.rule != "accumulate":
            bad.append(FieldViolation(f"tiers[{i}].soft_exit", f"needs accumulated confidence, the rule is {policy.rule}; use rule accumulate"))
    if policy.default_tier not in seen:
        bad.append(FieldViolation("default_tier", f"{policy.default_tier!r} is no tier of this policy; it has {', '.join(sorted(seen))}"))
    return bad


def _validate_adaptation(policy: Policy) -> list[FieldViolation]:
    adaptation = policy.adaptation
    bad: list[FieldViolation] = []
    rates = adaptation.target_exit_rates
    if len(rates) > MAX_CHECKPOINTS:
        return [FieldViolation("adaptation.target_exit_rates", f"{len(rates)} rates; at most {MAX_CHECKPOINTS}")]
    if adaptation.enabled and len(rates) != len(policy.checkpoints):
        found = f"{len(rates)} rates for {len(policy.checkpoints)} checkpoints"
        bad.append(FieldViolation("adaptation.target_exit_rates", f"{found}; give one each"))
    if adaptation.enabled and policy.rule == "accumulate":
        bad.append(FieldViolation("adaptation.enabled", "follows the quantiles of single risks, the rule is accumulate; use rule first or single"))
    bad += [FieldViolation(f"adaptation.target_exit_rates[{i}]", f"{r} is outside 0..1") for i, r in enumerate(rates) if not 0 <= r <= 1]
    if not 0 < adaptation.alpha <= 1:
        bad.append(FieldViolation("adaptation.alpha", f"{adaptation.alpha} is outside (0, 1]; 0.1 is usual"))
    if not 0 <= adaptation.warmup_steps <= 1_000_000:
        bad.append(FieldViolation("adaptation.warmup_steps", f"{adaptation.warmup_steps} is outside 0..1000000"))
    if not 64 <= adaptation.window_tokens <= 65536:
        bad.append(FieldViolation("adaptation.window_tokens", f"{adaptation.window_tokens} is outside 64..65536"))
    if not 0 <= adaptation.generation <= MAX_GENERATION:
        bad.append(FieldViolation("adaptation.generation", f"{adaptation.generation} is outside 0..{MAX_GENERATION}"))
    low, high = adaptation.min_threshold, adaptation.max_threshold
    if not (math.isfinite(low) and math.isfinite(high) and 0 <= low <= high):
        bad.append(FieldViolation("adaptation.min_threshold", f"bounds {low} to {high}: give 0 <= min_threshold <= max_threshold, both finite"))
    return bad


def _validate_audit(audit: Audit) -> list[FieldViolation]:
    bad: list[FieldViolation] = []
    if not 0 <= audit.share <= 1:
        bad.append(FieldViolation("audit.share", f"{audit.share} is outside 0..1; 0.01 audits one bounded request in a hundred"))
    for name in ("max_mismatch", "max_nll_difference"):
        bound = getattr(audit, name)
        if bound is not None and not 0 <= bound <= 1:
            bad.append(FieldViolation(f"audit.{name}", f"{bound} is outside 0..1; leave it out to guard nothing"))
        elif bound is not None and audit.share == 0:
            bad.append(FieldViolation(f"audit.{name}", f"{bound} guards nothing while audit.share is 0; audit a share of the requests, such as 0.01"))
    if not 0.5 <= audit.confidence < 1:
        bad.append(FieldViolation("audit.confidence", f"{audit.confidence} is outside 0.5 to below 1; 0.99 is usual"))
    if audit.action not in ("rollback", "exact"):
        bad.append(FieldViolation("audit.action", f"{audit.action!r} is unknown; use rollback or exact"))
    return bad


def _validate_speculation(policy: Policy, layout: Layout | None) -> list[FieldViolation]:
    """Check the knobs; without a draft they have no effect, so that one policy serves engines with and without."""
    knobs = policy.speculation
    bad: list[FieldViolation] = []
    if not 0 <= knobs.max_tokens <= MAX_DRAFT_TOKENS:
        remedy = "0 drafts as many as the engine's draft proposes"
        bad.append(FieldViolation("speculation.max_tokens", f"{knobs.max_tokens} is outside 0..{MAX_DRAFT_TOKENS}; {remedy}"))
    elif layout and layout.draft and knobs.max_tokens > layout.max_draft_tokens:
        room = f"{knobs.max_tokens} is over {layout.max_draft_tokens}, for which this engine was started"
        bad.append(FieldViolation("speculation.max_tokens", f"{room}; give less, or restart it with a larger SEDAC_DRAFT_TOKENS"))
    if knobs.min_confidence is not None and not 0 <= knobs.min_confidence <= 1:
        bad.append(FieldViolation("speculation.min_confidence", f"{knobs.min_confidence} is outside 0..1; leave it out for the draft's own"))
    known = [EXACT, *(tier.name for tier in policy.get_tiers()[:MAX_TIERS])]
    if len(knobs.tiers) > MAX_TIERS + 1:
        return [*bad, FieldViolation("speculation.tiers", f"{len(knobs.tiers)} tiers; name each once, or none for all")]
    for i, name in enumerate(knobs.tiers):
        if name not in known:
            has = f"it has {', '.join(known)}; name one of them, or none for all"
            bad.append(FieldViolation(f"speculation.tiers[{i}]", f"{name[:80]!r} is no tier of this policy, {has}"))
    return bad


def _validate_probe_set(policy: Policy, layout: Layout, named: ProbeSetSummary | None) -> list[FieldViolation]:
    """Check the set that a policy names: `named`, where one of that name can be loaded, else it must be the attached one."""
    name = policy.probe_set
    if named is None:
        if name == layout.probe_set:
            return []
        found = f"{name[:80]!r} is neither attached ({layout.probe_set!r} is) nor uploaded"
        return [FieldViolation("probe_set", f"{found}; upload it with `sedac ctl probe-set upload`, or leave it empty for the attached one")]
    problem = find_fit_problem(named, layout)
    if problem:
        return [FieldViolation("probe_set", f"{name!r} can't be loaded: {problem}")]
    has = ", ".join(map(str, named.checkpoint_layers))
    return [
        FieldViolation(f"checkpoints[{i}].layer", f"{c.layer} has no probe in {name!r} (it has {has}); leave the checkpoint out, or name another set")
        for i, c in enumerate(policy.checkpoints)
        if c.layer in layout.checkpoint_layers and c.layer not in named.checkpoint_layers
    ]


def _validate_certificate(policy: Policy, certificate: Certificate, layout: Layout | None, named: ProbeSetSummary | None) -> list[FieldViolation]:
    bad = certificate.find_violations()
    if bad:
        return bad
    remedy = "certify again on this model with `sedac-probes certify`, or leave the certificate out with `sedac ctl policy apply --force`"
    tiers = [tier.name for tier in policy.get_tiers()]
    if certificate.tier not in tiers:
        return [FieldViolation("certificate.tier", f"{certificate.tier!r} is no tier of this policy, it has {', '.join(tiers)}; {remedy}")]
    knobs = get_knobs_digest(policy, certificate.tier)
    if certificate.knobs_sha256 != knobs:
        found = f"{certificate.knobs_sha256[:12]}..., this policy's tier {certificate.tier!r} has {knobs[:12]}..."
        bad.append(FieldViolation("certificate.knobs_sha256", f"{found}: knobs were changed; {remedy}"))
    if policy.adaptation.enabled:
        bad.append(FieldViolation("adaptation.enabled", f"moves the thresholds from those that were certified; turn it off, {remedy}"))
    if layout:
        digest = find_certified_digest(named, layout) if named else layout.probe_set_sha256
        for name, engine in (("weights_sha256", layout.weights_sha256), ("probe_set_sha256", digest)):
            stated = getattr(certificate, name)
            if named and not digest and name == "probe_set_sha256":
                what = f"{named.name!r} has no levels of its own, beside those attached it is a set that nobody certified"
                bad.append(FieldViolation(f"certificate.{name}", f"{stated[:12]}...: {what}; upload the whole set, or leave the certificate out"))
            elif not engine:
                why = "the engine does not know its own, see its log; name it a model whose files it can read, or"
                bad.append(FieldViolation(f"certificate.{name}", f"{stated[:12]}... can't be checked: {why} leave the certificate out with --force"))
            elif stated != engine:
                bad.append(FieldViolation(f"certificate.{name}", f"{stated[:12]}..., the engine has {engine[:12]}...; {remedy}"))
    return bad
