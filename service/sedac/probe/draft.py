"""The draft artifact: how a part of the model proposes tokens that the whole of it verifies. manifest.json + head.safetensors.

Read by serving and training. Three kinds, one form: the model's own layers 0..depth-1 (some without attention or MLP, their MLPs at a
level), then a small head of its own, then the model's own lm_head:
- `adapter` (Kangaroo): a decoder layer with its own KV cache after a shallow part of the model;
- `exit-head` (CascadeExit): a SwiGLU block after a deeper part, without attention;
- `reduced`: the whole model with parts left out, without a head.
T tokens, D hidden size, F neurons of the head.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sedac.errors import ArtifactError

FORMAT = "sedac-draft/1"
ADAPTER, EXIT_HEAD, REDUCED = "adapter", "exit-head", "reduced"
KINDS = (ADAPTER, EXIT_HEAD, REDUCED)
MAX_DRAFT_TOKENS = 16
_MAX_MANIFEST_BYTES = 512 * 1024
_REMEDY = "write it with `sedac-probes distill`"

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
    """layers of the model that a draft runs, from the first one on; all of them where kind is `reduced`"""
    skip_attention: tuple[int, ...] = ()
    """layers, 0-based, whose attention a draft leaves out"""
    skip_mlp: tuple[int, ...] = ()
    """layers, 0-based, whose MLP a draft leaves out"""
    level: str = "full"
    """of the other MLPs, as in the probe set"""
    intermediate_size: int = 0
    """neurons of the head's own MLP; 0: it has none"""
    num_heads: int = 0
    """of the head's attention; 0: it has none"""
    num_kv_heads: int = 0
    head_size: int = 0
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_tokens: int = 4
    """proposed draft tokens per step at most"""
    min_confidence: float = 0.4
    """proposed: a sequence stops drafting when the product of its drafts' confidences falls below it"""
    sha256: str = ""
    """of head.safetensors; empty: there is none"""
    acceptance: tuple[float, ...] = ()
    """on held-out text, by position: share of the drafts there that the model accepts when those before were accepted"""
    training: dict[str, Any] = field(default_factory=dict)
    format: str = FORMAT


class DraftHead(nn.Module):
    """A draft's own layer and norm in plain torch: what training fits and what the serving one must equal.

    Reads the residual stream x (B, T, D) after layer depth-1 and gives the state that the model's lm_head reads.
    """

    def __init__(self, manifest: DraftManifest) -> None:
        super().__init__()
        m = self.manifest = manifest
        size, eps = m.hidden_size, m.rms_norm_eps
        if m.num_heads:
            self.input_layernorm = nn.RMSNorm(size, eps=eps)
            self.q_proj = nn.Linear(size, m.num_heads * m.head_size, bias=False)
            self.k_proj = nn.Linear(size, m.num_kv_heads * m.head_size, bias=False)
            self.v_proj = nn.Linear(size, m.num_kv_heads * m.head_size, bias=False)
            self.o_proj = nn.Linear(m.num_heads * m.head_size, size, bias=False)
        if m.intermediate_size:
            self.post_attention_layernorm = nn.RMSNorm(size, eps=eps)
            self.gate_proj = nn.Linear(size, m.intermediate_size, bias=False)
            self.up_proj = nn.Linear(size, m.intermediate_size, bias=False)
            self.down_proj = nn.Linear(m.intermediate_size, size, bias=False)
        self.norm = nn.RMSNorm(size, eps=eps)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the normed state (B, T, D); rows are one text each, positions count from 0."""
        m = self.manifest
        if m.num_heads:
            x_BTD = x_BTD + self._attend(self.input_layernorm(x_BTD))
        if m.intermediate_size:
            h_BTD = self.post_attention_layernorm(x_BTD)
            x_BTD = x_BTD + self.down_proj(nn.functional.silu(self.gate_proj(h_BTD)) * self.up_proj(h_BTD))
        normed: Tensor = self.norm(x_BTD)
        return normed

    def _attend(self, h_BTD: Tensor) -> Tensor:
        m, (num_texts, length, _) = self.manifest, h_BTD.shape

        def split(projected: Tensor, heads: int) -> Tensor:
            return projected.view(num_texts, length, heads, m.head_size).transpose(1, 2)

        cos_TH, sin_TH = get_rotation(torch.arange(length, device=h_BTD.device), m.head_size, m.rope_theta)
        q = rotate(split(self.q_proj(h_BTD), m.num_heads), cos_TH, sin_TH)
        k = rotate(split(self.k_proj(h_BTD), m.num_kv_heads), cos_TH, sin_TH)
        v = split(self.v_proj(h_BTD), m.num_kv_heads)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        attended: Tensor = self.o_proj(out.transpose(1, 2).reshape(num_texts, length, -1))
        return attended


def get_rotation(positions_T: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (T, head_size / 2), fp32, of rotary position embedding (arXiv:2104.09864, eq. 15)."""
    frequencies_H = theta ** (-torch.arange(0, head_size, 2, device=positions_T.device, dtype=torch.float32) / head_size)
    angles_TH = positions_T.float()[:, None] * frequencies_H
    return angles_TH.cos(), angles_TH.sin()


def rotate(x: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Rotate (..., T, head_size), whose first and second half belong together."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos_TH - second * sin_TH, second * cos_TH + first * sin_TH], dim=-1).to(x.dtype)


def read_draft_manifest(directory: Path) -> DraftManifest:
    """Read and check manifest.json of a draft.

    Raises:
        ArtifactError: it is missing, malformed, or a field is out of range.
    """
    path = directory / "manifest.json"
    if not path.is_file():
        raise ArtifactError(f"draft missing: {path}; {_REMEDY}, or leave SEDAC_DRAFT_DIR out")
    try:
        data = path.read_bytes()
        if len(data) > _MAX_MANIFEST_BYTES:
            raise ValueError(f"over {_MAX_MANIFEST_BYTES} bytes")
        fields = json.loads(data.decode("utf-8"))
        tuples = {name: tuple(fields.get(name, ())) for name in ("skip_attention", "skip_mlp", "acceptance")}
        manifest = DraftManifest(**{**fields, **tuples})
        fault = _find_fault(manifest)
    except (ValueError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise ArtifactError(f"{path} is not a draft's manifest ({str(error)[:200]}); {_REMEDY}") from error
    if fault:
        raise ArtifactError(f"{path}: field {fault}; {_REMEDY}")
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


def load_head(directory: Path, manifest: DraftManifest) -> dict[str, Tensor]:
    """Read the head's weights, checked against the manifest: its digest, names, shapes, and that all are finite; fp32.

    Raises:
        ArtifactError: what does not fit.
    """
    if manifest.kind == REDUCED:
        return {}
    path = directory / "head.safetensors"
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != manifest.sha256:
            raise ArtifactError(f"{path} has sha256 {digest[:12]}..., its manifest says {manifest.sha256[:12]}...; copy the draft again")
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} can't be read ({error}); copy the draft again") from error
    wanted = {name: tuple(p.shape) for name, p in DraftHead(manifest).named_parameters()}
    found = {name: tuple(t.shape) for name, t in weights.items()}
    if found != wanted:
        odd = sorted(set(found.items()) ^ set(wanted.items()))[:3]
        raise ArtifactError(f"{path} does not hold the tensors of its manifest ({odd}); {_REMEDY}")
    for name, tensor in weights.items():
        if not torch.isfinite(tensor.float()).all():
            raise ArtifactError(f"{path}: {name} holds numbers that are not finite; {_REMEDY}")
    return {name: tensor.float() for name, tensor in weights.items()}


def save_draft(directory: Path, manifest: DraftManifest, head: DraftHead | None) -> DraftManifest:
    """Write a draft; returns its manifest with the digest of the weights, which are kept in bf16."""
    directory.mkdir(parents=True, exist_ok=True)
    if head is not None:
        path = directory / "head.safetensors"
        save_file({name: p.detach().to(torch.bfloat16).contiguous() for name, p in head.named_parameters()}, path)
        manifest = DraftManifest(**{**asdict(manifest), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    (directory / "manifest.json").write_text(json.dumps(asdict(manifest), indent=1) + "\n")
    return manifest
