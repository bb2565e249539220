"""A draft's manifest, in plain Python: how a part of the model drafts, and which model it fits.

Read by the front end and by `sedac doctor`, which need no torch; the head beside it is draft.py's. Three kinds, one form: the model's own
layers 0..depth-1 (some without attention or MLP, their MLPs at a level), then a small head of its own, then the model's own lm_head:
- `adapter` (Kangaroo): a decoder layer with its own KV cache after a shallow part of the model;
- `exit-head` (CascadeExit): a SwiGLU block after a deeper part, without attention;
- `reduced`: the whole model with parts left out, without a head.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sedac.errors import ArtifactError
from sedac.policy.model import FULL, MAX_DRAFT_TOKENS

FORMAT = "sedac-draft/1"
ADAPTER, EXIT_HEAD, REDUCED = "adapter", "exit-head", "reduced"
KINDS = (ADAPTER, EXIT_HEAD, REDUCED)
_MAX_MANIFEST_BYTES = 512 * 1024
REMEDY = "write it with `sedac-probes distill`"

Kind = Literal["adapter", "exit-head", "reduced"]


@dataclass(frozen=True, kw_only=True)
class DraftManifest:
    """How to draft, and for which model."""

    name: str
    kind: str
    model: str
    hidden_size: int
    num_layers: int
    depth: int
    """Layers of the model that a draft runs, from the first one on. All of them where kind is `reduced`."""
    skip_attention: tuple[int, ...] = ()
    """Layers whose attention a draft leaves out, 0-based."""
    skip_mlp: tuple[int, ...] = ()
    """Layers whose MLP a draft leaves out, 0-based."""
    level: str = "full"
    """Level of the other MLPs, as in the probe set."""
    intermediate_size: int = 0
    """Neurons of the head's own MLP. 0 means that it has none."""
    num_heads: int = 0
    """Number of heads in the attention of the draft's head. 0 means that it has no attention."""
    num_kv_heads: int = 0
    head_size: int = 0
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_tokens: int = 4
    """Proposed limit of draft tokens per step."""
    min_confidence: float = 0.4
    """Proposed: a sequence stops drafting when the product of its drafts' confidences falls below it."""
    sha256: str = ""
    """Digest of head.safetensors. If empty, there is no such file."""
    acceptance: tuple[float, ...] = ()
    """Share of the drafts at each position that the model accepts when those before were accepted, on held-out text."""
    training: dict[str, Any] = field(default_factory=dict)
    format: str = FORMAT


def read_draft_manifest(directory: Path) -> DraftManifest:
    """Read and check manifest.json of a draft.

    Raises:
        ArtifactError: it is missing, malformed, or a field is out of range.
    """
    path = directory / "manifest.json"
    if not path.is_file():
        raise ArtifactError(f"draft missing: {path}; {REMEDY}, or leave SEDAC_DRAFT_DIR out")
    try:
        data = path.read_bytes()
        if len(data) > _MAX_MANIFEST_BYTES:
            raise ValueError(f"over {_MAX_MANIFEST_BYTES} bytes")
        fields = json.loads(data.decode("utf-8"))
        tuples = {name: tuple(fields.get(name, ())) for name in ("skip_attention", "skip_mlp", "acceptance")}
        manifest = DraftManifest(**{**fields, **tuples})
        fault = _find_fault(manifest)
    except (ValueError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise ArtifactError(f"{path} is not a draft's manifest ({str(error)[:200]}); {REMEDY}") from error
    if fault:
        raise ArtifactError(f"{path}: field {fault}; {REMEDY}")
    return manifest


def _find_fault(m: DraftManifest) -> str:
    if m.format != FORMAT:
        return f"format is {m.format!r}; only {FORMAT} is known"
    if m.kind not in KINDS:
        return f"kind is {m.kind!r}; use {', '.join(KINDS)}"
    limits = [
        ("hidden_size", 1, 1 << 20), ("num_layers", 1, 4096), ("depth", 1, m.num_layers), ("intermediate_size", 0, 1 << 22),
        ("num_heads", 0, 4096), ("num_kv_heads", 0, 4096), ("head_size", 0, 4096), ("max_tokens", 1, MAX_DRAFT_TOKENS),
    ]  # fmt: skip
    for name, least, most in limits:
        value = getattr(m, name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            return f"{name} is {value!r}; give an integer from {least} to {most}"
    if not 0 <= m.min_confidence <= 1:
        return f"min_confidence is {m.min_confidence!r}; give a number from 0 to 1"
    for name in ("skip_attention", "skip_mlp"):
        if any(not isinstance(i, int) or not 0 <= i < m.depth for i in getattr(m, name)):
            return f"{name} is {getattr(m, name)!r}; give layers from 0 to {m.depth - 1}"
    if m.kind == ADAPTER and not (m.num_heads and m.num_kv_heads and m.head_size and m.num_heads % m.num_kv_heads == 0):
        return f"num_heads is {m.num_heads}, num_kv_heads {m.num_kv_heads}, head_size {m.head_size}; an adapter needs attention"
    if m.kind == EXIT_HEAD and (m.num_heads or not m.intermediate_size):
        return f"num_heads is {m.num_heads}, intermediate_size {m.intermediate_size}; an exit head is an MLP without attention"
    if m.kind == REDUCED and (m.num_heads or m.intermediate_size or m.sha256):
        return "kind is reduced, which has no head of its own; leave num_heads, intermediate_size and sha256 out"
    return ""


def check_fit(manifest: DraftManifest, *, hidden_size: int, num_layers: int, levels: Collection[str]) -> None:
    """Hold a draft against the model that it shall draft for, and the levels that the engine has.

    Raises:
        ArtifactError: it is of another model, or runs MLPs at a level that is not there.
    """
    if (manifest.hidden_size, manifest.num_layers) != (hidden_size, num_layers):
        raise ArtifactError(
            f"draft {manifest.name!r} was made for hidden size {manifest.hidden_size} and {manifest.num_layers} layers, the model has "
            f"{hidden_size} and {num_layers}; make one for this model with `sedac-probes distill`"
        )
    if manifest.level != FULL and manifest.level not in levels:
        raise ArtifactError(
            f"draft {manifest.name!r} runs MLPs at level {manifest.level!r}, which this engine does not have; it has {', '.join(levels)}: "
            "name the probe set that the draft was made with, and leave SEDAC_LEVELS at 1"
        )
