"""Settings of the engine's side: the SEDAC_* environment variables, checked once at the edge.

`sedac serve` reads them, merges its flags and hands the result down by environment, so that the front end and the workers
read the same. A variable that is unknown is refused by name. The variables of the first policy are those that its knobs name
(sedac.policy.model); SEDAC_POLICY names a file in their place.
"""

from __future__ import annotations

import difflib
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_origin

from google.protobuf import json_format
from pydantic import Field, ValidationError, ValidationInfo, create_model, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from sedac import logs
from sedac.contract import wire
from sedac.contract.v1 import control_pb2
from sedac.errors import ConfigError, PolicyInvalid
from sedac.policy.check import validate
from sedac.policy.knob import list_fields, list_knobs
from sedac.policy.layout import Layout
from sedac.policy.model import FULL, MAX_DRAFT_TOKENS, SKIP, Checkpoint, Policy, Rule, Tier
from sedac.probe.manifest import Manifest

MIN_WEIGHT_MIB, MAX_MIN_WEIGHT_MIB = 16, 65536
"""Default of `min_weight_mib` (its reading takes what two launches take) and the most that it may be, in MiB."""
_PREFIX = "SEDAC_"
_ELSEWHERE = ("SEDAC_CONTROL_", "SEDAC_TEST_", "SEDAC_COMPOSE_", *logs.VARIABLES)
_PRESETS = (
    Tier(name="conservative", threshold_scale=0.5),
    Tier(name="balanced"),
    Tier(name="aggressive", threshold_scale=2.0),
)
"""Tiers where the probe set brings none. They are hard exits."""
_PER_CHECKPOINT = "checkpoints."
_UNSET: tuple[Any, ...] = (None, (), "")


def why_not_min_weight_mib(value: object) -> str:
    """Return what is wrong with a value of `min_weight_mib` and what to do; empty: nothing."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_MIN_WEIGHT_MIB:
        return ""
    limits = f"0 (no MLP is too small) to {MAX_MIN_WEIGHT_MIB}"
    return f"{value!r} is not a whole number of MiB from {limits}; change it, or leave it out for {MIN_WEIGHT_MIB}"


def _list_fields() -> dict[str, Any]:
    """Return a setting for each variable of a knob; those that EngineSettings declares itself, such as draft_tokens, are its own."""
    found: dict[str, Any] = {}
    for path, field in list_knobs(Policy):
        assert field.knob
        is_list = field.is_list or path.startswith(_PER_CHECKPOINT)
        kind: Any = Literal[field.words] if field.words else field.type
        for variable in field.knob.variables:
            setting = Field(default=() if is_list else "" if kind is str else None, description=field.knob.describe_variable(field.default))
            found[variable.lower()] = (Annotated[tuple[kind, ...], NoDecode] if is_list else kind if kind is str else kind | None, setting)
    return found


if TYPE_CHECKING:
    _FirstPolicy = BaseSettings
else:  # the knobs' variables have no other declaration than the knobs
    _FirstPolicy = create_model("_FirstPolicy", __base__=BaseSettings, **_list_fields())


class EngineSettings(_FirstPolicy):
    """What an engine starts with, and beside it the variables of sedac.policy.model, which make its first policy."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, env_ignore_empty=True, frozen=True, extra="forbid")

    model: str = ""
    """Model directory or name. If empty, the demo model."""
    policy: Path | None = None
    """File of the first policy, as `sedac ctl policy get --json` prints one. If unset, the variables and the probe set make it."""
    probe_dir: Path = Path()
    """Directory of the probe set (manifest.json, probes.safetensors)."""
    probe_layers: Annotated[tuple[int, ...], NoDecode] = ()
    """Decoder layers with a checkpoint, 0-based, comma-separated. If empty, all that the probe set has."""
    probe_rank: int | None = Field(default=None, gt=0)
    """Rank that the probe set must have. If unset, any."""
    draft_dir: Path = Path()
    """Directory of the draft (manifest.json, head.safetensors). If empty, the demo model's own, or none with other models. `none` means no draft."""
    draft_tokens: int | None = Field(default=None, ge=1, le=MAX_DRAFT_TOKENS)
    """Limit of draft tokens of one sequence per step: the engine keeps room for it, and the first policy takes it. If unset, the draft's limit."""
    log_every: int = Field(default=0, ge=0)
    """Steps between two log lines of exit rates. 0 means never."""
    levels: bool = True
    """Whether to offer the probe set's reduced levels, which keep a copy of the MLP weights on a CPU. 0 means hard exits only."""
    min_weight_mib: int = MIN_WEIGHT_MIB
    """An MLP of fewer MiB on a rank keeps its own products at few rows on a GPU. From 0, where none is too small, to 65536."""
    preload: bool = True
    """Whether `sedac serve` preloads the libraries that vLLM's CPU backend asks for, where the environment has them: libiomp5, tcmalloc."""
    control_address: str = ""
    """Address of the control service, as host:port. If empty, the engine serves under the first policy alone."""
    engine_id: str = Field(default_factory=socket.gethostname, min_length=1, max_length=128)
    """Name of this engine on the control service, stable over restarts."""
    poll_seconds: float = Field(default=0.5, ge=0.05, le=60)
    """Seconds between two readings of the workers' counters, while the engine has anything to compute."""
    join_seconds: float = Field(default=10.0, ge=0, le=600)
    """Seconds to wait at the start for the control service's policy before serving under the first. 0 means not at all."""
    probe_cache: Path | None = None
    """Directory for probe sets fetched from the control service. If unset, `sedac/probe-sets` in the user's cache, or a temporary one."""

    @field_validator("*", mode="before")
    @classmethod
    def _split(cls, value: Any, info: ValidationInfo) -> Any:
        is_list = get_origin(cls.model_fields[str(info.field_name)].annotation) is tuple
        return [part.strip() for part in value.split(",") if part.strip()] if is_list and isinstance(value, str) else value

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
        """Read the first policy from its file, or build it from these settings and the probe set's own thresholds and tiers.

        Whether a file's certificate is for this model is checked where the model's weights are known.

        Raises:
            ConfigError: names the file and the field, or the variables, that don't fit each other or the probe set.
        """
        proposed = {p.layer: p.threshold for p in manifest.probes}
        if twice := [layer for layer in self.probe_layers if self.probe_layers.count(layer) > 1]:
            raise ConfigError(f"SEDAC_PROBE_LAYERS names layer {twice[0]} twice; give each layer once")
        layers = tuple(sorted(self.probe_layers)) or tuple(proposed)
        if self.probe_rank not in (None, manifest.rank):
            raise ConfigError(
                f"SEDAC_PROBE_RANK is {self.probe_rank}, probe set {manifest.name!r} has rank {manifest.rank}; change it or leave it out"
            )
        if missing := [layer for layer in layers if layer not in proposed]:
            raise ConfigError(
                f"SEDAC probe missing for layer {missing[0]}: {self.probe_dir} has layers {list(proposed)}; train one or leave the layer out"
            )
        levels = (FULL, SKIP, *(level.name for level in manifest.levels if self.levels))
        layout = Layout(
            num_layers=manifest.num_layers, hidden_size=manifest.hidden_size, checkpoint_layers=layers, probe_set=manifest.name, levels=levels
        )
        values = self._find_values()
        if self.policy is not None:
            return self._read_policy(self.policy, values, layout)
        policy = self._build_policy(values, {layer: proposed[layer] for layer in layers}, manifest)
        try:
            validate(policy, layout)
        except PolicyInvalid as error:
            variables = {path: field.knob.variable for path, field in list_knobs(Policy) if field.knob and field.knob.variable}
            paths = {re.sub(r"\[\d+\]", "", violation.field) for violation in error.violations}
            names = sorted(_PREFIX + variables[path] for path in paths if path in variables)
            raise ConfigError(f"the first policy is invalid: {error}; check {', '.join(names) or 'the probe set'}") from error
        return policy

    def _find_values(self) -> dict[str, Any]:
        """Return the value of each knob whose variable is set, by path."""
        found = {}
        for path, field in list_knobs(Policy):
            names = field.knob.variables if field.knob else ()
            given = {name: value for name in names if (value := getattr(self, name.lower())) not in _UNSET}
            if len(set(given.values())) > 1:
                said = " and ".join(f"{_PREFIX}{name} is {value}" for name, value in given.items())
                raise ConfigError(f"{said}; they are one knob: give one")
            if given:
                found[path] = next(iter(given.values()))
        return found

    def _read_policy(self, file: Path, values: Mapping[str, Any], layout: Layout) -> Policy:
        own = {"checkpoints.layer", "speculation.max_tokens"}  # what is attached, and the room for drafts, are no policy's to say
        beside = [field.knob.variable for path, field in list_knobs(Policy) if path in values and path not in own and field.knob]
        if beside:
            names = ", ".join(_PREFIX + name for name in beside)
            raise ConfigError(f"SEDAC_POLICY={file} and {names} set the first policy twice; leave the file out, or write into it what they say")
        try:
            policy = wire.policy_from_proto(json_format.Parse(file.read_text(encoding="utf-8"), control_pb2.Policy()))
            validate(policy)
            validate(replace(policy, certificate=None), layout)
        except PolicyInvalid as error:
            raise ConfigError(f"SEDAC_POLICY={file}: {'; '.join(map(str, error.violations))}; change the file") from error
        except (OSError, UnicodeDecodeError, json_format.ParseError) as error:
            remedy = "give a policy as `sedac ctl policy get --json` prints it"
            raise ConfigError(f"SEDAC_POLICY={file} can't be read as a policy: {error}; {remedy}") from error
        return policy

    def _build_policy(self, values: Mapping[str, Any], proposed: Mapping[int, float], manifest: Manifest) -> Policy:
        """Build the policy of the variables' values; `proposed` are the probe set's thresholds of the attached layers."""
        layers = list(proposed)
        for path, field in list_knobs(Policy):
            is_per_checkpoint = path.startswith(_PER_CHECKPOINT) or (field.is_list and field.type is float)
            if path in values and is_per_checkpoint and len(values[path]) != len(layers) and field.knob:
                count, name = len(values[path]), _PREFIX + field.knob.variable
                raise ConfigError(f"{name} has {count} values for {len(layers)} checkpoints {layers}; give one each")
        if values.get("adaptation.enabled") and "adaptation.target_exit_rates" not in values:
            raise ConfigError("SEDAC_ADAPTIVE needs SEDAC_EXIT_RATES, one rate from 0 to 1 per checkpoint, such as 0.2,0.4")
        tiers = self._make_tiers(manifest, soft_exit=values.get("tiers.soft_exit", False))
        lists = {path.removeprefix(_PER_CHECKPOINT): value for path, value in values.items() if path.startswith(_PER_CHECKPOINT)}
        lists.pop("layer", None)
        checkpoints = tuple(
            Checkpoint(layer=layer, **{"threshold": threshold, **{name: value[i] for name, value in lists.items()}})
            for i, (layer, threshold) in enumerate(proposed.items())
        )
        made: dict[str, Any] = {"checkpoints": checkpoints, "tiers": tiers, "rule": _find_rule(values), "default_tier": _find_default(tiers)}
        for field in list_fields(Policy):
            if field.is_part and not field.is_list:
                knobs = {path.partition(".")[2]: value for path, value in values.items() if path.startswith(f"{field.name}.")}
                made |= {field.name: field.type(**knobs)} if knobs else {}
            elif field.name in values:
                made[field.name] = values[field.name]
            elif field.knob and field.knob.first is not None:
                made[field.name] = field.knob.first
        return Policy(**made)

    def _make_tiers(self, manifest: Manifest, *, soft_exit: bool) -> tuple[Tier, ...]:
        found = tuple(Tier(name=t.name, floor=t.floor, level=t.level, threshold_scale=t.threshold_scale) for t in manifest.tiers if self.levels)
        return tuple(replace(tier, soft_exit=soft_exit) for tier in found or _PRESETS)


def _find_rule(values: Mapping[str, Any]) -> Rule:
    rule, is_soft = values.get("rule"), values.get("tiers.soft_exit", False)
    if is_soft and rule not in (None, "accumulate"):
        raise ConfigError(f"SEDAC_SOFT_EXIT needs accumulated confidence, SEDAC_RULE is {rule}; leave one of them out")
    return rule or ("accumulate" if is_soft else Policy.rule)


def _find_default(tiers: Sequence[Tier]) -> str:
    return next((tier.name for tier in tiers if tier.name == Policy.default_tier), tiers[0].name)


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
