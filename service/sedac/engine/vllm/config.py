"""The `sedac` entry of `--additional-config`: what can't change while the engine runs, and by which SEDAC is asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from sedac.errors import ConfigError
from sedac.settings import MIN_WEIGHT_MIB, why_not_min_weight_mib

CONFIG_KEY = "sedac"
"""Entry of `--additional-config`. It enters vLLM's config hash, so that compiled graphs of another layout are not reused."""


def find_entry(vllm_config: Any) -> dict[str, Any] | None:
    """Return the entry of an engine's configuration (VllmConfig); None: SEDAC was not asked for."""
    additional = getattr(vllm_config, "additional_config", None)
    return additional.get(CONFIG_KEY) if isinstance(additional, dict) else None


@dataclass(frozen=True, kw_only=True)
class StaticConfig:
    """What can't change while the engine runs."""

    probe_set: str = ""
    """Directory of the probe set. It may be empty only with `record` or `draft`."""
    checkpoint_layers: tuple[int, ...] = ()
    """Decoder layers with a checkpoint, 0-based. If empty, all that the probe set has."""
    levels: bool = True
    """Whether to offer the probe set's reduced levels, not only `full` and `skip`."""
    max_rank: int = 0
    """Largest rank of probes that can be swapped in later. Two probes of it are held per checkpoint (fp32, rank x hidden size).
    0 means 128, or the attached set's rank where that is larger."""
    min_weight_mib: int = MIN_WEIGHT_MIB
    """An MLP of fewer MiB on a rank keeps its own products at few rows on a GPU. From 0, where none is too small, to 65536."""
    draft: str = ""
    """Directory of the draft of self-speculation. If empty, there is none."""
    draft_sha256: str = ""
    """Digest of the draft's manifest, filled in by the drafter, so that compiled graphs of another draft are not reused."""
    graph_sha256: str = ""
    """Digest of the model's parts, filled in by the worker, so that compiled graphs of other parts are not reused."""
    record: bool = False
    """Whether to record streams at the checkpoints instead of serving decisions."""
    record_top_k: int = 8
    """How many of the most likely next tokens to record with each token."""
    record_final: bool = False
    """Whether to record the normed states that the lm_head reads, in place of what it makes of them."""

    @classmethod
    def from_vllm(cls, vllm_config: Any) -> StaticConfig | None:
        """Read the entry; None where there is none.

        Raises:
            ConfigError: a key is unknown, a value is outside its limits, or SEDAC is asked for by the environment but has no entry.
        """
        entry = find_entry(vllm_config)
        if entry is None:
            if os.environ.get("SEDAC_ENABLED", "0").lower() in ("1", "true", "yes", "on"):
                raise ConfigError("SEDAC_ENABLED is set, but this engine was started without SEDAC; start it with `sedac serve`")
            return None
        try:
            static = cls(**{**entry, "checkpoint_layers": tuple(entry.get("checkpoint_layers", ()))})
        except TypeError as error:
            raise ConfigError(f"--additional-config {CONFIG_KEY}: {error}; known keys: {', '.join(cls.__dataclass_fields__)}") from error
        if reason := why_not_min_weight_mib(static.min_weight_mib):
            raise ConfigError(f"--additional-config {CONFIG_KEY}: min_weight_mib: {reason}")
        return static
