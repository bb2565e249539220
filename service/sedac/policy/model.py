"""The policy: every knob that may change at run time, as plain Python.

The control service stores it, the agent carries it, the engine applies it; sedac.policy.check says whether it may.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sedac.policy.certificate import Certificate

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
"""in `vllm_xargs` of a request (SamplingParams.extra_args): its tier, and where the policy allows overrides, its own knobs. The server
stamps every request with its tier, the policy's default where it named none; what reaches a worker without TIER_KEY is exact"""
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
    """see sedac.policy.weights; empty: unknown, so that no certificate can be checked"""
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
