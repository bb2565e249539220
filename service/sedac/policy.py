"""The policy: every knob that may change at run time, as plain Python.

The control service stores it, the agent carries it, the engine applies it. Validation that needs no engine is here;
what depends on the attached model takes its `Layout`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sedac.errors import FieldViolation, PolicyInvalid

Phase = Literal["decode", "all"]
Scope = Literal["token", "batch"]

MAX_CHECKPOINTS = 256
TIER_KEY = "sedac_tier"
"""in `vllm_xargs` of a request (SamplingParams.extra_args); `exact` keeps every token of the request in full"""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A probe's place and its threshold."""

    layer: int
    """decoder layer, 0-based"""
    threshold: float
    """risk below it counts as confident; >= 0 and finite; 0 never exits"""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The knobs of one revision; see `Policy` in control.proto for each field's meaning."""

    enabled: bool = False
    probe_set: str = ""
    checkpoints: tuple[Checkpoint, ...] = ()
    phase: Phase = "decode"
    scope: Scope = "token"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Policy:
        """Build from `to_dict`'s form.

        Raises:
            TypeError: a key is unknown or missing.
        """
        return cls(**{**data, "checkpoints": tuple(Checkpoint(**c) for c in data.get("checkpoints", ()))})


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What an engine has attached; a policy may only name these."""

    num_layers: int
    hidden_size: int
    checkpoint_layers: tuple[int, ...]
    probe_set: str


def validate(policy: Policy, layout: Layout | None = None) -> None:
    """Check a policy, and against an attached model where its `layout` is given.

    Raises:
        PolicyInvalid: with every field at fault.
    """
    bad: list[FieldViolation] = []
    if policy.phase not in ("decode", "all"):
        bad.append(FieldViolation("phase", f"{policy.phase!r} is unknown; use decode or all"))
    if policy.scope not in ("token", "batch"):
        bad.append(FieldViolation("scope", f"{policy.scope!r} is unknown; use token or batch"))
    if len(policy.checkpoints) > MAX_CHECKPOINTS:
        bad.append(FieldViolation("checkpoints", f"{len(policy.checkpoints)} checkpoints; at most {MAX_CHECKPOINTS}"))
    else:
        bad += _validate_checkpoints(policy.checkpoints, layout)
    if layout and policy.probe_set not in ("", layout.probe_set):
        bad.append(
            FieldViolation("probe_set", f"{policy.probe_set!r} is not loaded; the engine has {layout.probe_set!r}: name that one or leave it empty")
        )
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
    return bad
