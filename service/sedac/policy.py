"""The policy: every knob that may change at run time, as plain Python.

The control service stores it, the agent carries it, the engine applies it. Validation that needs no engine is here;
what depends on the attached model takes its `Layout`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from sedac.certificate import Certificate, get_knobs_digest
from sedac.errors import FieldViolation, PolicyInvalid
from sedac.fit import ProbeSetSummary, find_certified_digest, find_fit_problem

Phase = Literal["decode", "all"]
Scope = Literal["token", "batch"]
Rule = Literal["first", "accumulate", "single"]
GuardAction = Literal["rollback", "exact"]

MAX_CHECKPOINTS = 256
MAX_TIERS = 31
MAX_LEVELS = 16
MAX_GENERATION = 2**31 - 1
MAX_DRAFT_TOKENS = 16
"""of a sequence per step"""
FULL, SKIP = "full", "skip"
"""the levels that every engine has, in this order; a probe set may add others after them"""
EXACT = "exact"
"""the tier that always exists and that no policy may redefine"""
TIER_KEY, SCALE_KEY, LEVEL_KEY = "sedac_tier", "sedac_threshold_scale", "sedac_level"
"""in `vllm_xargs` of a request (SamplingParams.extra_args): its tier, and where the policy allows overrides, its own knobs"""
CERTIFICATE_KEY = "sedac_certificate"
"""beside them, set by the server alone: the knobs' digest of the certificate that the request was promised to be computed under"""
REQUEST_KEY = "sedac_key"
"""beside them, of the request: who it is for; requests of one key are of one arm while a roll-out goes on. The server takes it out"""
ARM_KEY, ROLLOUT_KEY, AUDIT_KEY = "sedac_arm", "sedac_rollout", "sedac_audit"
"""set by the server alone: the arm (absent: stable), its roll-out's number, and whether the answer will be scored again"""
SPECULATION_KEY = "sedac_speculation"
"""in `vllm_xargs` of a request: false, and none of its tokens is drafted; its answer is the same"""
STABLE, CANARY = "stable", "canary"
"""the arms: the policy in force, and a roll-out's candidate beside it"""
_MAX_LEVEL_CHARS = 64
_TIER_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A probe's place and what counts as confident there."""

    layer: int
    """decoder layer, 0-based"""
    threshold: float
    """risk below it counts as confident; >= 0 and finite; 0 never exits"""
    weight: float = 1.0
    """of this checkpoint's confidence in the sum of rule `accumulate`; >= 0"""
    target: float = 0.5
    """accumulated confidence from which on a token counts as confident, rule `accumulate` alone; > 0"""


@dataclass(frozen=True, kw_only=True)
class Tier:
    """What requests that name this tier get."""

    name: str
    floor: str = FULL
    """level of every token that the phase allows, in all layers"""
    level: str = SKIP
    """level of confident tokens, in the layers above the checkpoint"""
    threshold_scale: float = 1.0
    """multiplies every threshold; 0: no token is confident"""
    soft_exit: bool = False
    """spend less the more confident, up to `level`: ratio = tanh(2C - 1) / 2 + 1/2 of the accumulated confidence C"""


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """Thresholds that follow target exit rates; the policy's own are where they start."""

    enabled: bool = False
    frozen: bool = False
    """keep the thresholds as they are now"""
    target_exit_rates: tuple[float, ...] = ()
    """one per checkpoint: share of the tokens evaluated there that shall exit there, 0 to 1"""
    alpha: float = 0.1
    """weight of the newest quantile in the moving average, over 0 up to 1"""
    warmup_steps: int = 32
    """steps with evaluated tokens before the first change"""
    window_tokens: int = 2048
    """risks remembered per checkpoint, 64 to 65536"""
    min_threshold: float = 0.0
    max_threshold: float = 1e6
    generation: int = 0
    """another number forgets what was learned and starts again from the policy's thresholds"""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What share of the bounded answers is scored again in full, and what the guard does about what that shows."""

    share: float = 0.0
    """of the bounded requests, 0 to 1; 0: none"""
    max_mismatch: float | None = None
    """the guard's bound on the share of greedy tokens that the full model would not choose, 0 to 1; None: not guarded"""
    max_nll_difference: float | None = None
    """the guard's bound on what the answer's tokens lose in log-probability, mean in nats per token, 0 to 1; None: not guarded"""
    confidence: float = 0.99
    """of the limits that are held against the bounds, 0.5 to below 1"""
    action: GuardAction = "rollback"
    """back to the last good revision (to exact where there is none), or the same policy not enabled"""


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """Self-speculation of engines that have a draft; it changes no answer, only when it comes."""

    enabled: bool = True
    max_tokens: int = 0
    """draft tokens of a sequence per step at most; 0: as many as the engine's draft proposes"""
    min_confidence: float | None = None
    """a sequence stops drafting when the product of its drafts' confidences falls below it, 0 to 1; None: the draft's own"""
    adaptive: bool = True
    """choose lengths and stopping rules from measured costs and acceptance, down to no drafting; the two above are its limits and its start"""
    tiers: tuple[str, ...] = ()
    """whose requests speculate, `exact` among them; empty: all"""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The knobs of one revision; see `Policy` in control.proto for each field's meaning."""

    enabled: bool = False
    probe_set: str = ""
    checkpoints: tuple[Checkpoint, ...] = ()
    phase: Phase = "decode"
    scope: Scope = "token"
    rule: Rule = "first"
    decay: float = 0.9
    """rule `accumulate`: what the confidence so far keeps at the next checkpoint, 0 to 1"""
    sensitivity: float = 0.0
    """how much a request's own prompt risk, against the mean prompt's, lowers its thresholds; 0: not at all"""
    tiers: tuple[Tier, ...] = ()
    """beside `exact`; empty: one tier `balanced` with hard exits"""
    default_tier: str = "balanced"
    """of requests that name none"""
    allow_overrides: bool = False
    """whether a request may bring its own level or threshold scale"""
    adaptation: Adaptation = field(default_factory=Adaptation)
    certificate: Certificate | None = None
    """of one of the tiers with these very knobs; None: UNCERTIFIED"""
    audit: Audit = field(default_factory=Audit)
    speculation: Speculation = field(default_factory=Speculation)

    def get_tiers(self) -> tuple[Tier, ...]:
        """Return the tiers beside `exact`, the implied one where none is listed."""
        return self.tiers or (Tier(name="balanced"),)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Policy:
        """Build from `to_dict`'s form.

        Raises:
            TypeError: a key is unknown or missing.
        """
        adaptation = dict(data.get("adaptation", {}))
        adaptation["target_exit_rates"] = tuple(adaptation.get("target_exit_rates", ()))
        speculation = data.get("speculation", {})
        parts = {
            "checkpoints": tuple(Checkpoint(**c) for c in data.get("checkpoints", ())),
            "tiers": tuple(Tier(**t) for t in data.get("tiers", ())),
            "adaptation": Adaptation(**adaptation),
            "certificate": Certificate(**data["certificate"]) if data.get("certificate") else None,
            "audit": Audit(**data.get("audit", {})),
            "speculation": Speculation(**{**speculation, "tiers": tuple(speculation.get("tiers", ()))}),
        }
        return cls(**{**data, **parts})


@dataclass(frozen=True, kw_only=True)
class Canary:
    """A roll-out's candidate, beside the policy in force, for its share of the requests."""

    rollout: int
    """the roll-out's number, over 0"""
    policy: Policy
    share: float
    """of the requests, 0 to 1"""

    def has(self, key: str) -> bool:
        """Whether requests of `key` belong to it; a key that was once in stays in while the share grows."""
        digest = hashlib.sha256(f"{self.rollout}:{key}".encode(errors="surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") < self.share * 2**64

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What an engine has attached; a policy may only name these."""

    num_layers: int
    hidden_size: int
    checkpoint_layers: tuple[int, ...]
    probe_set: str
    levels: tuple[str, ...] = (FULL, SKIP)
    weights_sha256: str = ""
    """see sedac.weights; empty: unknown, so that no certificate can be checked"""
    probe_set_sha256: str = ""
    """empty: unknown"""
    max_rank: int = 0
    """of probes that can be loaded without a restart; 0: none can"""
    levels_sha256: str = ""
    """of the reduced levels attached, see sedac.probe.verify; empty: none"""
    draft: str = ""
    """kind of its own draft, see sedac.probe.draft_manifest; empty: none"""
    max_draft_tokens: int = 0
    """of a sequence per step, fixed at the start; 0: no draft"""


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
