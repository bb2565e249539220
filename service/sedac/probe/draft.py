"""The draft artifact: how a part of the model proposes tokens that the whole of it verifies. manifest.json + head.safetensors.

Read by serving and training; draft_manifest.py says what kinds there are. T tokens, D hidden size, F neurons of the head.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sedac.errors import ArtifactError
from sedac.policy.model import MAX_DRAFT_TOKENS as MAX_DRAFT_TOKENS
from sedac.probe.draft_manifest import ADAPTER as ADAPTER
from sedac.probe.draft_manifest import EXIT_HEAD as EXIT_HEAD
from sedac.probe.draft_manifest import FORMAT as FORMAT
from sedac.probe.draft_manifest import KINDS as KINDS
from sedac.probe.draft_manifest import REDUCED as REDUCED
from sedac.probe.draft_manifest import REMEDY as REMEDY
from sedac.probe.draft_manifest import DraftManifest as DraftManifest
from sedac.probe.draft_manifest import Kind as Kind
from sedac.probe.draft_manifest import read_draft_manifest as read_draft_manifest


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
            """Return a projection by heads: (texts, heads, length, head size)."""
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
        raise ArtifactError(f"{path} does not hold the tensors of its manifest ({odd}); {REMEDY}")
    for name, tensor in weights.items():
        if not torch.isfinite(tensor.float()).all():
            raise ArtifactError(f"{path}: {name} holds numbers that are not finite; {REMEDY}")
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
