"""The policy: every knob that may change at run time. This is the place of a knob: its type, default, limits, help and names.

Validation, the wire form, the options of `sedac ctl`, the variables of the first policy, the tables and the reference page follow from
the fields below. The control service stores a policy, the agent carries it, the engine applies it; sedac.policy.check says whether it may.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import SkipValidation, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from sedac.policy.certificate import Certificate
from sedac.policy.knob import FORBID_UNKNOWN, Knob

Phase = Literal["decode", "all"]
Scope = Literal["token", "batch"]
Rule = Literal["first", "accumulate", "single"]
GuardAction = Literal["rollback", "exact"]

MAX_CHECKPOINTS = 256
MAX_TIERS = 31
MAX_LEVELS = 16
MAX_GENERATION = 2**31 - 1
MAX_DRAFT_TOKENS = 16
"""Limit of draft tokens of one sequence per step."""
FULL, SKIP = "full", "skip"
"""The levels that every engine has, in this order. A probe set may add others after them."""
EXACT = "exact"
"""The tier that always exists and that no policy may redefine."""
STABLE, CANDIDATE = "stable", "candidate"
"""The two sides of a roll-out: the policy in force, and the candidate beside it."""
_CHECKPOINTS, _DECISION, _TIERS = "Checkpoints: after which layers a probe reads the stream", "Decision", "Tiers"
_AUDIT = "Audit: answers scored again in full, and the guard"
_SPECULATION = "Self-speculation: drafts that the whole model verifies, where engines have a draft"


@dataclass(frozen=True, kw_only=True, config=FORBID_UNKNOWN)
class Checkpoint:
    """A probe's place and what counts as confident there."""

    layer: Annotated[
        int,
        Knob(
            help="Decoder layer, 0-based.", ge=0, remedy="layers count from 0", option="",
            variable="PROBE_LAYERS", earlier=("PROBE_LAYERS",), published="7, 14, 21 of 36 layers; 5, 12, 19 of 28",
        ),
    ]  # fmt: skip
    threshold: Annotated[
        float,
        Knob(
            help="Risk below it counts as confident; 0 turns a checkpoint off",
            form="LAYER=VALUE or all=VALUE; may be repeated. {help}, a new LAYER adds one.",
            unit="risk", ge=0, remedy="0 turns the checkpoint off", variable="THRESHOLDS", earlier=("THRESHOLDS",),
        ),
    ]  # fmt: skip
    weight: Annotated[
        float,
        Knob(
            help="this checkpoint's part in the confidence of rule accumulate.", form="LAYER=VALUE or all=VALUE: {help}",
            ge=0, remedy="1 is neutral", variable="LAYER_WEIGHTS", earlier=("LAYER_WEIGHTS",), published="0.3, 0.4, 0.3 (v6.1)",
        ),
    ] = 1.0  # fmt: skip
    target: Annotated[
        float,
        Knob(
            help="accumulated confidence from which on a token exits.", form="LAYER=VALUE or all=VALUE: {help}",
            unit="confidence", gt=0, remedy="0.5 is usual", variable="TARGETS",
        ),
    ] = 0.5  # fmt: skip


@dataclass(frozen=True, kw_only=True, config=FORBID_UNKNOWN)
class Tier:
    """What requests that name this tier get."""

    name: Annotated[
        str,
        Knob(
            help="1 to 32 of a-z, 0-9, - and _, a letter first.",
            pattern="[a-z][a-z0-9_-]{0,31}", wrong="is no name", remedy="use 1 to 32 of a-z, 0-9, - and _, a letter first", option="",
        ),
    ]  # fmt: skip
    floor: Annotated[
        str,
        Knob(
            help="Level of every token that the phase allows, in all layers; new tiers: {default}.",
            unit="level", min_length=1, max_length=64, remedy="name a level",
        ),
    ] = FULL  # fmt: skip
    level: Annotated[
        str,
        Knob(
            help="Level of confident tokens, in the layers above the checkpoint; new tiers: {default}.",
            unit="level", min_length=1, max_length=64, remedy="name a level",
        ),
    ] = SKIP  # fmt: skip
    threshold_scale: Annotated[
        float,
        Knob(help="Multiplies every threshold; 0: no token is confident, 2: twice as many risks pass.", ge=0, remedy="1 is neutral"),
    ] = 1.0  # fmt: skip
    soft_exit: Annotated[
        bool,
        Knob(
            help="Spend less the more confident, up to the level; needs rule accumulate.", option="--soft-exit/--hard-exit",
            help_for_all="In every tier: less the more confident; needs --rule accumulate.", variable="SOFT_EXIT", earlier=("SOFT_EXIT",),
            variable_help="In every tier: spend less the more confident, up to the level; makes the rule accumulate.",
        ),
    ] = False  # fmt: skip
    """With soft exit, ratio = tanh(2C - 1) / 2 + 1/2 of the accumulated confidence C."""


@dataclass(frozen=True, kw_only=True, config=FORBID_UNKNOWN)
class Adaptation:
    """Thresholds that follow target exit rates; the policy's own are where they start."""

    enabled: Annotated[
        bool,
        Knob(
            help="Whether thresholds follow target exit rates.", option="--adaptive/--fixed", variable="ADAPTIVE", earlier=("ADAPTIVE",),
        ),
    ] = False  # fmt: skip
    frozen: Annotated[bool, Knob(help="Keep the adapted thresholds as they are.", option="--frozen/--thawed")] = False
    target_exit_rates: Annotated[
        tuple[float, ...],
        Knob(
            help="share of the tokens evaluated there that shall exit.", form="LAYER=RATE or all=RATE, {limits}: {help}",
            unit="share of tokens, one per checkpoint",
            ge=0, le=1, max_length=MAX_CHECKPOINTS, entries="rates", option="--exit-rate", variable="EXIT_RATES", earlier=("EXIT_RATES",),
        ),
    ] = ()  # fmt: skip
    alpha: Annotated[
        float,
        Knob(
            help="{Limits}: how fast thresholds move; 0.1 averages about ten steps.", unit="weight of the newest quantile",
            gt=0, le=1, remedy="0.1 is usual", variable="ALPHA", earlier=("ALPHA", "CALIBRATION_ALPHA"),
        ),
    ] = 0.1  # fmt: skip
    warmup_steps: Annotated[
        int,
        Knob(
            help="Steps with evaluated tokens before the first change.", unit="steps",
            ge=0, le=1_000_000, variable="CALIBRATION_STEPS", earlier=("CALIBRATION_STEPS",),
        ),
    ] = 32  # fmt: skip
    window_tokens: Annotated[
        int, Knob(help="{Limits}: risks remembered per checkpoint; more is steadier and slower.", unit="tokens", ge=64, le=65536)
    ] = 2048
    min_threshold: Annotated[float, Knob(help="Adapted thresholds stay at or above it.", unit="risk", ge=0)] = 0.0
    max_threshold: Annotated[float, Knob(help="Adapted thresholds stay at or below it.", unit="risk", ge=0)] = 1e6
    generation: Annotated[
        int,
        Knob(
            help="Another number forgets what was learned and starts again from the policy's thresholds; `sedac ctl adaptation reset`.",
            ge=0, le=MAX_GENERATION, option="",
        ),
    ] = 0  # fmt: skip


@dataclass(frozen=True, kw_only=True, config=FORBID_UNKNOWN)
class Audit:
    """What share of the bounded answers is scored again in full, and what the guard does about what that shows."""

    share: Annotated[
        float,
        Knob(
            help="{limits}: share of the bounded requests that is scored again in full; 0: none.", unit="share of requests",
            ge=0, le=1, remedy="0.01 audits one bounded request in a hundred", option="--audit-share", variable="AUDIT_SHARE",
        ),
    ] = 0.0  # fmt: skip
    max_mismatch: Annotated[
        float | None,
        Knob(
            help="Guard: share of tokens that the full model would not choose, {limits}; none: not guarded.", unit="share of greedy tokens",
            ge=0, le=1, remedy="leave it out to guard nothing", option="--max-mismatch", word_for_none="none", variable="AUDIT_MAX_MISMATCH",
        ),
    ] = None  # fmt: skip
    max_nll_difference: Annotated[
        float | None,
        Knob(
            help="Guard: what tokens lose in log-probability, mean in nats, {limits}; none: not guarded.", unit="nats per token",
            ge=0, le=1, remedy="leave it out to guard nothing", option="--max-nll-difference", word_for_none="none",
            variable="AUDIT_MAX_NLL_DIFFERENCE",
        ),
    ] = None  # fmt: skip
    confidence: Annotated[
        float,
        Knob(
            help="{limits}: of the limits that the guard holds against its bounds.", ge=0.5, lt=1, remedy="0.99 is usual",
            option="--audit-confidence",
        ),
    ] = 0.99  # fmt: skip
    action: Annotated[
        SkipValidation[GuardAction],
        Knob(help="On a breach: rollback to the last good revision, or exact, the same policy disabled.", option="--guard"),
    ] = "rollback"
    """Where there is no good revision, a rollback goes to exact too."""


@dataclass(frozen=True, kw_only=True, config=FORBID_UNKNOWN)
class Speculation:
    """Self-speculation of engines that have a draft; it changes no answer, only when it comes."""

    enabled: Annotated[
        bool, Knob(help="Whether engines draft; answers stay the same.", option="--speculation/--no-speculation", variable="SPECULATION")
    ] = True
    max_tokens: Annotated[
        int,
        Knob(
            help="{limits}: draft tokens of a sequence per step at most; 0: as many as the engine's draft proposes.", unit="tokens",
            ge=0, le=MAX_DRAFT_TOKENS, remedy="0 drafts as many as the engine's draft proposes", option="--draft-tokens", variable="DRAFT_TOKENS",
        ),
    ] = 0  # fmt: skip
    min_confidence: Annotated[
        float | None,
        Knob(
            help="{limits}: a sequence stops drafting when the product of its drafts' confidences falls below it; own: the draft's own.",
            ge=0, le=1, remedy="leave it out for the draft's own", option="--draft-confidence", word_for_none="own", variable="DRAFT_MIN_CONFIDENCE",
        ),
    ] = None  # fmt: skip
    adaptive: Annotated[
        bool,
        Knob(
            help="Choose lengths from measured costs and acceptance, down to no drafting; or always draft by the two above.",
            option="--draft-adaptive/--draft-fixed", variable="DRAFT_ADAPTIVE",
        ),
    ] = True  # fmt: skip
    tiers: Annotated[
        tuple[str, ...],
        Knob(
            help="Tier whose requests speculate, exact too; may be repeated. Empty: every tier.",
            max_length=MAX_TIERS + 1, remedy="name each once, or none for all", option="--draft-tier", variable="DRAFT_TIERS",
            variable_help="Tiers whose requests speculate, `exact` too; unset: every tier.",
        ),
    ] = ()  # fmt: skip


@dataclass(frozen=True, kw_only=True, config=FORBID_UNKNOWN)
class Policy:
    """The knobs of one revision; see `Policy` in policy.proto for its form on the wire."""

    enabled: Annotated[
        bool,
        Knob(
            help="Disabled: every request exact, as plain vLLM.", option="--enabled/--disabled", variable="ENABLED", earlier=("ENABLED",),
            first=True, decides=False,
        ),
    ] = False  # fmt: skip
    probe_set: Annotated[str, Knob(help="Name of the probe set; empty: the one the engine started with.", decides=False)] = ""
    checkpoints: Annotated[
        tuple[Checkpoint, ...],
        Knob(help="After which layers a probe reads the stream, in ascending order.", max_length=MAX_CHECKPOINTS, panel=_CHECKPOINTS),
    ] = ()
    phase: Annotated[
        SkipValidation[Phase],
        Knob(help="Which tokens may be reduced: generated ones, or the prompt's too.", panel=_DECISION, variable="PHASE"),
    ] = "decode"
    scope: Annotated[
        SkipValidation[Scope],
        Knob(help="Tokens exit one by one, or only all of a batch together.", panel=_DECISION, variable="SCOPE"),
    ] = "token"
    rule: Annotated[
        SkipValidation[Rule],
        Knob(
            help="first: exit at the first confident checkpoint. accumulate: confidence adds up. single: one checkpoint decides.",
            panel=_DECISION, variable="RULE", variable_help="{help} Unset beside SEDAC_SOFT_EXIT=1: accumulate.",
            published="single (v5), first (v6.0), accumulate (v6.1)",
        ),
    ] = "first"  # fmt: skip
    decay: Annotated[
        float,
        Knob(
            help="{limits}: what confidence keeps from one checkpoint to the next, rule accumulate.", panel=_DECISION, ge=0, le=1,
            remedy="the earlier versions used 0.9", variable="CONFIDENCE_DECAY", earlier=("CONFIDENCE_DECAY",), published="0.9 (v6.1)",
        ),
    ] = 0.9  # fmt: skip
    strict: Annotated[
        bool,
        Knob(
            help="Compute every token at its very level, also where more is as fast; then no answer depends on the batch.", panel=_DECISION,
            variable="STRICT", option="--strict/--at-least", since="0.3.0",
        ),
    ] = False  # fmt: skip
    """If false, a level is what a token gets at least: a row is computed in full where the engine's machine is not slower for it."""
    sensitivity: Annotated[
        float,
        Knob(
            help="{limits}: how much a prompt riskier than the mean lowers its request's thresholds; 0: off.", panel=_DECISION, ge=0, le=10,
            remedy="0 turns it off", variable="SENSITIVITY",
        ),
    ] = 0.0  # fmt: skip
    tiers: Annotated[
        tuple[Tier, ...],
        Knob(help="Tiers beside exact; empty: one, balanced, with hard exits.", max_length=MAX_TIERS, panel=_TIERS),
    ] = ()
    default_tier: Annotated[
        str,
        Knob(
            help="Tier of requests that name none; `exact` makes reducing opt-in.", panel=_TIERS, variable="TIER", decides=False,
            variable_help="{help} Unset: balanced, or the first tier of a probe set that has none of this name.",
        ),
    ] = "balanced"  # fmt: skip
    allow_overrides: Annotated[
        bool,
        Knob(
            help="Whether a request may bring its own sedac_level or sedac_threshold_scale.", panel=_TIERS, variable="ALLOW_OVERRIDES",
            option="--allow-overrides/--refuse-overrides", decides=False,
        ),
    ] = False  # fmt: skip
    adaptation: Annotated[Adaptation, Knob(help="Thresholds that follow target exit rates.", panel="Adaptation")] = Adaptation()
    certificate: Annotated[
        Certificate | None, Knob(help="Of one of the tiers with these very knobs; none: UNCERTIFIED.", option="", decides=False)
    ] = None
    audit: Annotated[Audit, Knob(help="Answers scored again in full, and the guard.", panel=_AUDIT, decides=False)] = Audit()
    speculation: Annotated[
        Speculation, Knob(help="Self-speculation of engines that have a draft.", panel=_SPECULATION, decides=False)
    ] = Speculation()  # fmt: skip

    def get_tiers(self) -> tuple[Tier, ...]:
        """Return the tiers beside `exact`, the implied one where none is listed."""
        return self.tiers or (Tier(name="balanced"),)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Policy:
        """Build from `to_dict`'s form, also after JSON; what is left out gets its default.

        Raises:
            TypeError: a key is unknown or missing, or a value of the wrong type.
        """
        try:
            return _POLICY.validate_python(data)
        except ValidationError as error:
            raise TypeError("; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())) from error


_POLICY = TypeAdapter(Policy)


@dataclass(frozen=True, kw_only=True, config=FORBID_UNKNOWN)
class Candidate:
    """A roll-out's candidate, beside the policy in force, for its share of the requests."""

    rollout: Annotated[int, Knob(help="The roll-out's number.", ge=1, remedy="they count from 1")]
    policy: Policy
    share: Annotated[float, Knob(help="Of the requests.", ge=0, le=1)]

    def has(self, key: str) -> bool:
        """Whether requests of `key` belong to it; a key that was once in stays in while the share grows."""
        digest = hashlib.sha256(f"{self.rollout}:{key}".encode(errors="surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") < self.share * 2**64

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)
