"""Settings of the engine's side: the SEDAC_* environment variables, checked once at the edge.

`sedac serve` reads them, merges its flags and hands the result down by environment, so that the front end and the workers
read the same. A variable that is unknown is refused by name.
"""

from __future__ import annotations

import difflib
import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from sedac import logs
from sedac.errors import ConfigError, PolicyInvalid
from sedac.policy.check import validate
from sedac.policy.layout import Layout
from sedac.policy.model import FULL, MAX_DRAFT_TOKENS, SKIP, Adaptation, Audit, Checkpoint, Policy, Rule, Speculation, Tier
from sedac.probe.manifest import Manifest

MIN_WEIGHT_MIB, MAX_MIN_WEIGHT_MIB = 16, 65536
"""in MiB: the default of `min_weight_mib` (its reading takes what two launches take), and the most it may be"""
_PREFIX = "SEDAC_"
_ELSEWHERE = ("SEDAC_CONTROL_", "SEDAC_TEST_", "SEDAC_COMPOSE_", *logs.VARIABLES)
_PRESETS = (
    Tier(name="conservative", threshold_scale=0.5),
    Tier(name="balanced"),
    Tier(name="aggressive", threshold_scale=2.0),
)
"""where the probe set brings no tiers: hard exits"""
_VARIABLES = {
    "layer": "SEDAC_PROBE_LAYERS",
    "].threshold": "SEDAC_THRESHOLDS",
    "weight": "SEDAC_LAYER_WEIGHTS",
    "].target": "SEDAC_TARGETS",
    "rule": "SEDAC_RULE",
    "decay": "SEDAC_CONFIDENCE_DECAY",
    "sensitivity": "SEDAC_SENSITIVITY",
    "default_tier": "SEDAC_TIER",
    "soft_exit": "SEDAC_SOFT_EXIT",
    "adaptation.enabled": "SEDAC_ADAPTIVE",
    "target_exit_rates": "SEDAC_EXIT_RATES",
    "warmup_steps": "SEDAC_CALIBRATION_STEPS",
    "alpha": "SEDAC_ALPHA",
    "audit.share": "SEDAC_AUDIT_SHARE",
    "audit.max_mismatch": "SEDAC_AUDIT_MAX_MISMATCH",
    "audit.max_nll_difference": "SEDAC_AUDIT_MAX_NLL_DIFFERENCE",
    "speculation.max_tokens": "SEDAC_DRAFT_TOKENS",
    "speculation.min_confidence": "SEDAC_DRAFT_MIN_CONFIDENCE",
    "speculation.tiers": "SEDAC_DRAFT_TIERS",
}
"""parts of a policy's field names, and the variables that set them"""


def why_not_min_weight_mib(value: object) -> str:
    """Return what is wrong with a value of `min_weight_mib` and what to do; empty: nothing."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_MIN_WEIGHT_MIB:
        return ""
    limits = f"0 (no MLP is too small) to {MAX_MIN_WEIGHT_MIB}"
    return f"{value!r} is not a whole number of MiB from {limits}; change it, or leave it out for {MIN_WEIGHT_MIB}"


class EngineSettings(BaseSettings):
    """What an engine starts with; everything but the layout can be changed later by policy."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, env_ignore_empty=True, frozen=True, extra="forbid")

    enabled: bool = True
    """whether the first policy lets tokens exit"""
    model: str = ""
    """model directory or name; empty: the demo model"""
    probe_dir: Path = Path()
    """directory of the probe set (manifest.json, probes.safetensors)"""
    probe_layers: Annotated[tuple[int, ...], NoDecode] = ()
    """decoder layers with a checkpoint, 0-based, comma-separated; empty: all that the probe set has"""
    probe_rank: int | None = Field(default=None, gt=0)
    """rank that the probe set must have; unset: any"""
    thresholds: Annotated[tuple[float, ...], NoDecode] = ()
    """risk below it counts as confident, one per checkpoint; empty: those of the probe set"""
    phase: Literal["decode", "all"] = "decode"
    """which tokens may exit at first"""
    scope: Literal["token", "batch"] = "token"
    """whether tokens exit one by one or only all together at first"""
    rule: Literal["first", "accumulate", "single"] | None = None
    """how checkpoints decide at first; unset: `first`, or `accumulate` with soft exits"""
    confidence_decay: float = 0.9
    """rule `accumulate`: what the confidence so far keeps at the next checkpoint, 0 to 1"""
    layer_weights: Annotated[tuple[float, ...], NoDecode] = ()
    """rule `accumulate`: weight of each checkpoint's confidence, one per checkpoint; empty: 1"""
    targets: Annotated[tuple[float, ...], NoDecode] = ()
    """rule `accumulate`: confidence from which on a token exits, one per checkpoint; empty: 0.5"""
    soft_exit: bool = False
    """every tier spends less the more confident instead of all or nothing; implies rule `accumulate`"""
    sensitivity: float = 0.0
    """how much a request's own prompt risk, against the mean prompt's, lowers its thresholds, 0 to 10"""
    tier: str = ""
    """of requests that name none; empty: `balanced`, or the first of the probe set where it has no tier of that name"""
    allow_overrides: bool = False
    """whether a request may bring its own level or threshold scale"""
    adaptive: bool = False
    """whether thresholds follow the exit rates at first"""
    exit_rates: Annotated[tuple[float, ...], NoDecode] = ()
    """share of the tokens evaluated at a checkpoint that shall exit there, one per checkpoint, 0 to 1"""
    calibration_steps: int = Adaptation.warmup_steps
    """steps with evaluated tokens before adaptation changes a threshold"""
    alpha: float | None = None
    """weight of the newest quantile in adaptation's moving average, over 0 up to 1; unset: 0.1"""
    calibration_alpha: float | None = None
    """another name of `alpha`"""
    audit_share: float = Audit.share
    """share of the bounded answers that is scored again in full at first, 0 to 1"""
    audit_max_mismatch: float | None = None
    """the guard's bound on the share of greedy tokens that the full model would not choose, 0 to 1; unset: not guarded"""
    audit_max_nll_difference: float | None = None
    """the guard's bound on what tokens lose in log-probability, mean in nats, 0 to 1; unset: not guarded"""
    draft_dir: Path = Path()
    """directory of the draft (manifest.json, head.safetensors); empty: none, or with the demo model its own; `none`: none"""
    draft_tokens: int | None = Field(default=None, ge=1, le=MAX_DRAFT_TOKENS)
    """draft tokens of a sequence per step at most: what the engine keeps room for, and at first the policy's own limit; unset: the draft's"""
    speculation: bool = True
    """whether the draft is used at first"""
    draft_min_confidence: float | None = None
    """a sequence stops drafting when the product of its drafts' confidences falls below it, 0 to 1; unset: the draft's own"""
    draft_adaptive: bool = True
    """whether lengths and stopping rules follow measured costs and acceptance at first, down to no drafting"""
    draft_tiers: Annotated[tuple[str, ...], NoDecode] = ()
    """tiers whose requests speculate at first, comma-separated, `exact` among them; empty: all"""
    log_every: int = Field(default=0, ge=0)
    """steps between two log lines of exit rates; 0: never"""
    levels: bool = True
    """offer the probe set's reduced levels, which keep a copy of the MLP weights on a CPU; 0: hard exits only"""
    min_weight_mib: int = MIN_WEIGHT_MIB
    """MLPs of fewer MiB on a rank keep their own products at few rows on a GPU, 0 to 65536; 0: none are too small"""
    control_address: str = ""
    """host:port of the control service; empty: serve under the first policy alone"""
    engine_id: str = Field(default_factory=socket.gethostname, min_length=1, max_length=128)
    """this engine's name on the control service; stable over restarts"""
    poll_seconds: float = Field(default=0.5, ge=0.05, le=60)
    """seconds between two readings of the workers' counters"""
    join_seconds: float = Field(default=10.0, ge=0, le=600)
    """how long to wait at the start for the control service's policy before serving under the first; 0: not at all"""
    probe_cache: Path | None = None
    """directory for probe sets fetched from the control service; unset: `sedac/probe-sets` in the user's cache, or a temporary one"""

    @field_validator("probe_layers", "thresholds", "layer_weights", "targets", "exit_rates", "draft_tiers", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("min_weight_mib")
    @classmethod
    def _check_min_weight_mib(cls, value: int) -> int:
        if reason := why_not_min_weight_mib(value):
            raise PydanticCustomError("min_weight_mib", "{reason}", {"reason": reason})
        return value

    def to_env(self) -> dict[str, str]:
        """Return the settings as environment variables for a child process."""
        env = {}
        for name, value in self:
            if value is not None:
                env[_PREFIX + name.upper()] = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        return env

    def make_policy(self, manifest: Manifest) -> Policy:
        """Build the first policy from these settings, and from the probe set's own thresholds and tiers.

        Raises:
            ConfigError: names the variables that don't fit each other or the probe set.
        """
        proposed = {p.layer: p.threshold for p in manifest.probes}
        layers = tuple(sorted(self.probe_layers)) or tuple(proposed)
        if self.probe_rank not in (None, manifest.rank):
            raise ConfigError(
                f"SEDAC_PROBE_RANK is {self.probe_rank}, probe set {manifest.name!r} has rank {manifest.rank}; change it or leave it out"
            )
        if missing := [layer for layer in layers if layer not in proposed]:
            raise ConfigError(
                f"SEDAC probe missing for layer {missing[0]}: {self.probe_dir} has layers {list(proposed)}; train one or leave the layer out"
            )
        for name in ("thresholds", "layer_weights", "targets", "exit_rates"):
            count = len(getattr(self, name))
            if count not in (0, len(layers)):
                raise ConfigError(f"SEDAC_{name.upper()} has {count} values for {len(layers)} checkpoints {list(layers)}; give one each")
        if self.adaptive and not self.exit_rates:
            raise ConfigError("SEDAC_ADAPTIVE needs SEDAC_EXIT_RATES, one rate from 0 to 1 per checkpoint, such as 0.2,0.4")
        tiers = self._make_tiers(manifest)
        policy = Policy(
            enabled=self.enabled,
            checkpoints=tuple(
                Checkpoint(layer=layer, threshold=threshold, weight=weight, target=target)
                for layer, threshold, weight, target in zip(
                    layers,
                    self.thresholds or (proposed[layer] for layer in layers),
                    self.layer_weights or repeat(Checkpoint.weight),
                    self.targets or repeat(Checkpoint.target),
                    strict=False,
                )
            ),
            phase=self.phase,
            scope=self.scope,
            rule=self._find_rule(),
            decay=self.confidence_decay,
            sensitivity=self.sensitivity,
            tiers=tiers,
            default_tier=self.tier or next((t.name for t in tiers if t.name == Policy.default_tier), tiers[0].name),
            allow_overrides=self.allow_overrides,
            adaptation=Adaptation(
                enabled=self.adaptive, target_exit_rates=self.exit_rates, warmup_steps=self.calibration_steps, alpha=self._find_alpha()
            ),
            audit=Audit(share=self.audit_share, max_mismatch=self.audit_max_mismatch, max_nll_difference=self.audit_max_nll_difference),
            speculation=Speculation(
                enabled=self.speculation,
                max_tokens=self.draft_tokens or Speculation.max_tokens,
                min_confidence=self.draft_min_confidence,
                adaptive=self.draft_adaptive,
                tiers=self.draft_tiers,
            ),
        )
        levels = (FULL, SKIP, *(level.name for level in manifest.levels if self.levels))
        layout = Layout(
            num_layers=manifest.num_layers, hidden_size=manifest.hidden_size, checkpoint_layers=layers, probe_set=manifest.name, levels=levels
        )
        try:
            validate(policy, layout)
        except PolicyInvalid as error:
            names = sorted({name for v in error.violations for field, name in _VARIABLES.items() if field in v.field})
            raise ConfigError(f"the first policy is invalid: {error}; check {', '.join(names) or 'the probe set'}") from error
        return policy

    def _make_tiers(self, manifest: Manifest) -> tuple[Tier, ...]:
        found = tuple(Tier(name=t.name, floor=t.floor, level=t.level, threshold_scale=t.threshold_scale) for t in manifest.tiers if self.levels)
        return tuple(replace(tier, soft_exit=self.soft_exit) for tier in found or _PRESETS)

    def _find_rule(self) -> Rule:
        if self.soft_exit and self.rule not in (None, "accumulate"):
            raise ConfigError(f"SEDAC_SOFT_EXIT needs accumulated confidence, SEDAC_RULE is {self.rule}; leave one of them out")
        return self.rule or ("accumulate" if self.soft_exit else Policy.rule)

    def _find_alpha(self) -> float:
        given = {alpha for alpha in (self.alpha, self.calibration_alpha) if alpha is not None}
        if len(given) > 1:
            raise ConfigError(f"SEDAC_ALPHA is {self.alpha} and SEDAC_CALIBRATION_ALPHA is {self.calibration_alpha}; they are one knob: give one")
        return given.pop() if given else Adaptation.alpha


def read_settings(environ: Mapping[str, str] = os.environ, **overrides: Any) -> EngineSettings:
    """Read SEDAC_* from the environment; `overrides` (from flags) win.

    Raises:
        ConfigError: names the variable, its value and the remedy.
    """
    known = {_PREFIX + name.upper() for name in EngineSettings.model_fields}
    for name in environ:
        if name.startswith(_PREFIX) and not name.startswith(_ELSEWHERE) and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(f"{name} is unknown" + (f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(known))}"))
    try:
        return EngineSettings(**{k: v for k, v in overrides.items() if v is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = _PREFIX + "_".join(str(part) for part in first["loc"][:1]).upper()
        raise ConfigError(f"{name}={first['input']!r}: {first['msg']}") from error
