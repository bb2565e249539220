"""Whether a policy may come into force: each field by its own limits, the fields together, and what the attached model has room for.

The limits of a single field are in sedac.policy.model; here are the rules across fields, and against a `Layout`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sedac.errors import FieldViolation, PolicyInvalid
from sedac.policy.certificate import Certificate
from sedac.policy.digest import get_knobs_digest
from sedac.policy.knob import find_violations, get_position
from sedac.policy.layout import Layout, ProbeSetSummary, find_certified_digest, find_fit_problem
from sedac.policy.model import EXACT, MAX_TIERS, SKIP, Policy


def validate(policy: Policy, layout: Layout | None = None, available: Mapping[str, ProbeSetSummary] = MappingProxyType({})) -> None:
    """Check a policy, and against an attached model where its `layout` is given.

    It may name the probe set that the engine started with, or one of those `available` by name that fits.

    Raises:
        PolicyInvalid: with every field at fault.
    """
    bad = list(find_violations(policy))
    found = _Found(policy=policy, layout=layout, refused=frozenset(v.field for v in bad))
    bad += _check_rule(found)
    if "checkpoints" not in found.refused:
        bad += _check_checkpoints(found)
    if "tiers" not in found.refused:
        bad += _check_tiers(found)
    if "adaptation.target_exit_rates" not in found.refused:
        bad += _check_adaptation(found)
    bad += _check_audit(found)
    bad += _check_speculation(found)
    named = available.get(policy.probe_set) if layout else None
    if policy.certificate and not any(field.startswith("certificate.") for field in found.refused):
        bad += _check_certificate(found, policy.certificate, named)
    if layout and policy.probe_set:
        bad += _check_probe_set(policy, layout, named)
    if bad:
        raise PolicyInvalid(sorted(bad, key=lambda violation: get_position(Policy, violation.field)))


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What is checked, and the fields that are out of their own limits, of which nothing more is said."""

    policy: Policy
    layout: Layout | None
    refused: frozenset[str]


def _check_rule(found: _Found) -> Iterator[FieldViolation]:
    active = sum(c.threshold > 0 for c in found.policy.checkpoints)
    if found.policy.rule == "single" and active > 1:
        yield FieldViolation("rule", f"single takes one checkpoint with a threshold over 0, {active} are given; use first, or set the others to 0")


def _check_checkpoints(found: _Found) -> Iterator[FieldViolation]:
    last, layout = -1, found.layout
    for i, checkpoint in enumerate(found.policy.checkpoints):
        layer, path = checkpoint.layer, f"checkpoints[{i}].layer"
        if path in found.refused:
            continue
        if layer <= last:
            yield FieldViolation(path, f"{layer} follows {last}; give each layer once, in ascending order")
        elif layout and layer not in layout.checkpoint_layers:
            attached = ", ".join(map(str, layout.checkpoint_layers)) or "none"
            yield FieldViolation(path, f"{layer} has no probe attached (attached: {attached}); restart the engine with it in SEDAC_PROBE_LAYERS")
        last = max(last, layer)


def _check_tiers(found: _Found) -> Iterator[FieldViolation]:
    policy, layout = found.policy, found.layout
    seen = {EXACT}
    for i, tier in enumerate(policy.get_tiers()):
        if tier.name in seen and f"tiers[{i}].name" not in found.refused:
            reason = "always exists and can't be redefined" if tier.name == EXACT else "is listed twice"
            yield FieldViolation(f"tiers[{i}].name", f"{tier.name!r} {reason}; choose another name")
        seen.add(tier.name)
        for knob, level in (("floor", tier.floor), ("level", tier.level)):
            if layout and level not in layout.levels and f"tiers[{i}].{knob}" not in found.refused:
                yield FieldViolation(f"tiers[{i}].{knob}", f"{level!r} is not a level of this engine; it has {', '.join(layout.levels)}")
        if tier.floor == SKIP:
            yield FieldViolation(f"tiers[{i}].floor", "skip would leave every token without any MLP; use full or a reduced level")
        if tier.soft_exit and policy.rule != "accumulate":
            yield FieldViolation(f"tiers[{i}].soft_exit", f"needs accumulated confidence, the rule is {policy.rule}; use rule accumulate")
    if policy.default_tier not in seen:
        yield FieldViolation("default_tier", f"{policy.default_tier!r} is no tier of this policy; it has {', '.join(sorted(seen))}")


def _check_adaptation(found: _Found) -> Iterator[FieldViolation]:
    knobs, policy = found.policy.adaptation, found.policy
    if knobs.enabled and len(knobs.target_exit_rates) != len(policy.checkpoints):
        has = f"{len(knobs.target_exit_rates)} rates for {len(policy.checkpoints)} checkpoints"
        yield FieldViolation("adaptation.target_exit_rates", f"{has}; give one each")
    if knobs.enabled and policy.rule == "accumulate":
        yield FieldViolation("adaptation.enabled", "follows the quantiles of single risks, the rule is accumulate; use rule first or single")
    low, high = knobs.min_threshold, knobs.max_threshold
    if low > high and found.refused.isdisjoint({"adaptation.min_threshold", "adaptation.max_threshold"}):
        yield FieldViolation("adaptation.min_threshold", f"bounds {low} to {high}: give 0 <= min_threshold <= max_threshold, both finite")


def _check_audit(found: _Found) -> Iterator[FieldViolation]:
    audit = found.policy.audit
    for name in ("max_mismatch", "max_nll_difference"):
        bound, path = getattr(audit, name), f"audit.{name}"
        if bound is not None and audit.share == 0 and path not in found.refused:
            yield FieldViolation(path, f"{bound} guards nothing while audit.share is 0; audit a share of the requests, such as 0.01")


def _check_speculation(found: _Found) -> Iterator[FieldViolation]:
    """Check the knobs; without a draft they have no effect, so that one policy serves engines with and without."""
    knobs, layout, path = found.policy.speculation, found.layout, "speculation.max_tokens"
    if layout and layout.draft and knobs.max_tokens > layout.max_draft_tokens and path not in found.refused:
        room = f"{knobs.max_tokens} is over {layout.max_draft_tokens}, for which this engine was started"
        yield FieldViolation(path, f"{room}; give less, or restart it with a larger SEDAC_DRAFT_TOKENS")
    known = [EXACT, *(tier.name for tier in found.policy.get_tiers()[:MAX_TIERS])]
    for i, name in enumerate(() if "speculation.tiers" in found.refused else knobs.tiers):
        if name not in known:
            has = f"it has {', '.join(known)}; name one of them, or none for all"
            yield FieldViolation(f"speculation.tiers[{i}]", f"{name[:80]!r} is no tier of this policy, {has}")


def _check_probe_set(policy: Policy, layout: Layout, named: ProbeSetSummary | None) -> list[FieldViolation]:
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


def _check_certificate(found: _Found, certificate: Certificate, named: ProbeSetSummary | None) -> list[FieldViolation]:
    bad: list[FieldViolation] = []
    policy, layout = found.policy, found.layout
    remedy = "certify again on this model with `sedac-probes certify`, or leave the certificate out with `sedac ctl policy apply --force`"
    tiers = [tier.name for tier in policy.get_tiers()]
    if certificate.tier not in tiers:
        return [FieldViolation("certificate.tier", f"{certificate.tier!r} is no tier of this policy, it has {', '.join(tiers)}; {remedy}")]
    knobs = get_knobs_digest(policy, certificate.tier)
    if certificate.knobs_sha256 != knobs:
        has = f"{certificate.knobs_sha256[:12]}..., this policy's tier {certificate.tier!r} has {knobs[:12]}..."
        bad.append(FieldViolation("certificate.knobs_sha256", f"{has}: knobs were changed; {remedy}"))
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
