"""Settings of the engine's side: the SEDAC_* environment variables, checked once at the edge.

`sedac serve` reads them, merges its flags and hands the result down by environment, so that the front end and the workers
read the same. A variable that is unknown, or that has no effect yet, is refused by name.
"""

from __future__ import annotations

import difflib
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from sedac.errors import ConfigError, PolicyInvalid
from sedac.policy import Checkpoint, Policy, validate
from sedac.probe.manifest import Manifest

_PREFIX = "SEDAC_"
_NO_EFFECT_YET = {
    "SEDAC_ADAPTIVE": "online calibration is not built yet: set thresholds, or leave it at 0",
    "SEDAC_EXIT_RATES": "online calibration is not built yet: set SEDAC_THRESHOLDS",
    "SEDAC_CALIBRATION_STEPS": "online calibration is not built yet: leave it out",
    "SEDAC_ALPHA": "online calibration is not built yet: leave it out",
    "SEDAC_CALIBRATION_ALPHA": "online calibration is not built yet: leave it out",
    "SEDAC_CONFIDENCE_DECAY": "accumulated confidence is not built yet: leave it out",
    "SEDAC_LAYER_WEIGHTS": "accumulated confidence is not built yet: leave it out",
    "SEDAC_SOFT_EXIT": "reduced MLPs are not built yet: leave it at 0",
}
_OFF = ("", "0", "false", "no", "off")
_ELSEWHERE = ("SEDAC_CONTROL_", "SEDAC_TEST_", "SEDAC_COMPOSE_")


class EngineSettings(BaseSettings):
    """What an engine starts with; everything but the layout can be changed later by policy."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, frozen=True, extra="forbid")

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
    log_every: int = Field(default=0, ge=0)
    """steps between two log lines of exit rates; 0: never"""
    control_address: str = ""
    """host:port of the control service; empty: serve under the first policy alone"""
    engine_id: str = Field(default_factory=socket.gethostname, min_length=1, max_length=128)
    """this engine's name on the control service; stable over restarts"""
    poll_seconds: float = Field(default=0.5, ge=0.05, le=60)
    """seconds between two readings of the workers' counters"""

    @field_validator("probe_layers", "thresholds", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    def to_env(self) -> dict[str, str]:
        """Return the settings as environment variables for a child process."""
        env = {}
        for name, value in self:
            if value is not None:
                env[_PREFIX + name.upper()] = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        return env

    def make_policy(self, manifest: Manifest) -> Policy:
        """Build the first policy from these settings and the probe set's own thresholds.

        Raises:
            ConfigError: layers, thresholds or rank don't fit the probe set.
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
        if self.thresholds and len(self.thresholds) != len(layers):
            raise ConfigError(f"SEDAC_THRESHOLDS has {len(self.thresholds)} values for {len(layers)} checkpoints {list(layers)}; give one each")
        thresholds = self.thresholds or tuple(proposed[layer] for layer in layers)
        checkpoints = tuple(Checkpoint(layer=layer, threshold=t) for layer, t in zip(layers, thresholds, strict=True))
        policy = Policy(enabled=self.enabled, checkpoints=checkpoints, phase=self.phase, scope=self.scope)
        try:
            validate(policy)
        except PolicyInvalid as error:
            raise ConfigError(f"the first policy is invalid: {error}; check SEDAC_PROBE_LAYERS and SEDAC_THRESHOLDS") from error
        return policy


def read_settings(environ: Mapping[str, str] = os.environ, **overrides: Any) -> EngineSettings:
    """Read SEDAC_* from the environment; `overrides` (from flags) win.

    Raises:
        ConfigError: names the variable, its value and the remedy.
    """
    known = {_PREFIX + name.upper() for name in EngineSettings.model_fields}
    for name, value in environ.items():
        if name in _NO_EFFECT_YET:
            if value.strip().lower() not in _OFF:
                raise ConfigError(f"{name}={value!r} has no effect yet: {_NO_EFFECT_YET[name]}")
        elif name.startswith(_PREFIX) and not name.startswith(_ELSEWHERE) and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(f"{name} is unknown" + (f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(known))}"))
    try:
        return EngineSettings(**{k: v for k, v in overrides.items() if v is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = _PREFIX + "_".join(str(part) for part in first["loc"][:1]).upper()
        raise ConfigError(f"{name}={first['input']!r}: {first['msg']}") from error
