"""What a draft takes from its model: sizes, the frozen lm_head, the final norm, and the limit on its own parameters.

Read from the model's files; nothing is run. D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from sedac.errors import ConfigError
from sedac.probe.draft import ADAPTER, EXIT_HEAD, DraftHead, DraftManifest
from torch import Tensor

from sedac_probes.collecting.recording import read_config

MAX_SHARE = 0.05
"""Largest share of the model's parameters that a draft's head may add."""
_STEP = 64  # widths are multiples of it


@dataclass(frozen=True, kw_only=True)
class Target:
    """The model, as far as a draft's head needs it."""

    model: str
    config: dict[str, Any]
    num_parameters: int
    lm_head_VD: Tensor
    """Weight of the lm_head, fp32."""
    norm_D: Tensor
    """Weight of the final norm, fp32."""

    @property
    def budget(self) -> int:
        """Parameters that a head may have."""
        return int(self.num_parameters * MAX_SHARE)


def read_target(model: str) -> Target:
    """Read the model's files.

    Raises:
        ConfigError: they hold no lm_head or final norm by the usual names, or logits that are not states times lm_head alone.
    """
    config = read_config(model)
    for name, plain in (("final_logit_softcapping", None), ("logits_scaling", 1), ("logit_scale", 1)):
        if config.get(name, plain) not in (plain, None):
            raise ConfigError(f"{model}: {name} is {config[name]!r}; distillation knows plain logits only: draft with --kind reduced")
    num_parameters = 0
    found: dict[str, Tensor] = {}
    wanted = {"lm_head.weight": "lm_head", "embed_tokens.weight": "embedding", "model.norm.weight": "norm", "language_model.norm.weight": "norm"}
    for name, shape, load in _read_tensors(Path(model)):
        num_parameters += math.prod(shape)
        for ending, part in wanted.items():
            if name == ending or name.endswith(f".{ending}"):
                found[part] = load().float()
    lm_head_VD = found.get("lm_head", found.get("embedding"))
    if lm_head_VD is None or "norm" not in found:
        raise ConfigError(f"{model} has no lm_head.weight or embed_tokens.weight, or no model.norm.weight; draft with --kind reduced")
    if str(config.get("model_type", "")).startswith("gemma"):
        found["norm"] = found["norm"] + 1  # Gemma keeps the weight less one
    return Target(model=model, config=config, num_parameters=num_parameters, lm_head_VD=lm_head_VD, norm_D=found["norm"])


def _read_tensors(directory: Path) -> Iterator[tuple[str, list[int], Any]]:
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise ConfigError(f"{directory} has no *.safetensors; convert the model's weights to safetensors")
    try:
        for path in paths:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  safe_open is no mapping
                    yield name, file.get_slice(name).get_shape(), lambda name=name, file=file: file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{directory} can't be read as safetensors ({error}); copy the model again") from error


def make_manifest(target: Target, kind: str, depth: int, intermediate_size: int = 0) -> DraftManifest:
    """Return the manifest of an untrained head after `depth` layers; `intermediate_size` 0: the most that is allowed and useful.

    Heads and their size are the model's own, so that an adapter's keys and values fit the model's KV cache. An adapter gets at most half
    of the neurons of the model's own MLPs, an exit head all of them.

    Raises:
        ConfigError: the head would be over the budget, or the model's rope is one that drafts don't know.
    """
    config = target.config
    sizes: dict[str, Any] = {"intermediate_size": 0}
    if kind == ADAPTER:
        num_heads = config["num_attention_heads"]
        sizes |= {
            "num_heads": num_heads,
            "num_kv_heads": config.get("num_key_value_heads") or num_heads,
            "head_size": config.get("head_dim") or config["hidden_size"] // num_heads,
            "rope_theta": float(_get_rope_theta(target)),
        }
    manifest = DraftManifest(
        name=f"{kind}-{depth}", kind=kind, model=Path(target.model).name, hidden_size=config["hidden_size"], num_layers=config["num_hidden_layers"],
        depth=depth, rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)), **sizes,
    )  # fmt: skip
    least = _count(manifest, 0)
    most = (target.budget - least - manifest.hidden_size) // (3 * manifest.hidden_size)
    usual = config.get("intermediate_size", most) // (2 if kind == ADAPTER else 1)
    width = intermediate_size or min(most, usual) // _STEP * _STEP
    if (width <= 0 and (kind == EXIT_HEAD or least > target.budget)) or width > most:
        raise ConfigError(
            f"a head of kind {kind} with {max(width, 0)} neurons has {_count(manifest, max(width, 0)):,} parameters, over {MAX_SHARE:.0%} of the "
            f"model's {target.num_parameters:,} ({target.budget:,}); give --neurons {max(0, most)} or less, or --kind reduced, which adds none"
        )
    return DraftManifest(**{**vars(manifest), "intermediate_size": max(width, 0)})


def _count(manifest: DraftManifest, width: int) -> int:
    with torch.device("meta"):
        return count_parameters(DraftHead(DraftManifest(**{**vars(manifest), "intermediate_size": width})))


def count_parameters(head: DraftHead | None) -> int:
    """Return how many parameters a draft adds to the model."""
    return sum(p.numel() for p in head.parameters()) if head is not None else 0


def _get_rope_theta(target: Target) -> float:
    config = target.config
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default" if not rope or "rope_theta" in rope else f"one per layer type ({', '.join(rope)})"))
    remedy = "an adapter's attention knows rope of type default over whole heads: use --kind exit-head or reduced"
    if kind != "default":
        raise ConfigError(f"{target.model}: rope_type is {kind!r}; {remedy}")
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1))
    if share not in (1, None):
        raise ConfigError(f"{target.model}: partial_rotary_factor is {share!r}; {remedy}")
    return float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))


def make_head(target: Target, manifest: DraftManifest, seed: int = 0) -> DraftHead:
    """Return an untrained head that starts as an early exit: what it adds to the stream is zero, its norm is the model's final one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = DraftHead(manifest)
        for name, p in head.named_parameters():
            if name in ("o_proj.weight", "down_proj.weight"):
                torch.nn.init.zeros_(p)
            elif p.ndim == 2:
                torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    with torch.no_grad():
        head.norm.weight.copy_(target.norm_D)
    return head
