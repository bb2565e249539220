"""The draft as a model: the target's own inner model with fewer layers, compiled on its own. Weights are shared, none is copied.

vLLM's inner models run over `self.layers`, so a shallow copy with another list of layers is the draft, whatever the architecture
does around them (embedding scales, final norm).
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from sedac.engine.drafting.heads import HeadLayer, Nothing
from sedac.engine.drafting.parts import RMSNorm, VllmConfig, support_torch_compile
from sedac.errors import UnsupportedModel
from sedac.probe.draft import DraftManifest


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1})
class DraftModel(nn.Module):
    """(T,) token ids and positions to normed states (T, D)."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", inner: Any, layers: list[nn.Module], norm: nn.Module | None) -> None:
        """`inner` is the target's model under the lm_head; `norm`: None, the target's own."""
        super().__init__()
        self.inner = _share(inner)
        self.inner.layers = nn.ModuleList(layers)
        if hasattr(inner, "end_layer"):
            self.inner.start_layer, self.inner.end_layer = 0, len(layers)
        if norm is not None:
            self.inner.norm = norm

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Run the draft's layers; keys and values go to the slots of the forward context."""
        hidden: Tensor = self.inner.forward(input_ids, positions, None)
        return hidden


def _share(module: Any) -> Any:
    """Copy a module, not its parts."""
    shared = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        shared.__dict__[name] = dict(module.__dict__[name])
    return shared


def make_layers(layers: nn.ModuleList, manifest: DraftManifest, head: HeadLayer | None) -> list[nn.Module]:
    """Return the draft's layers: the target's, without what the draft leaves out, and the head.

    Raises:
        UnsupportedModel: a part to leave out is not called `self_attn` or `mlp`.
    """
    made: list[nn.Module] = []
    for i, layer in enumerate(layers[: manifest.depth]):
        skipped = [name for name, where in (("self_attn", manifest.skip_attention), ("mlp", manifest.skip_mlp)) if i in where]
        if len(skipped) == 2 and i:
            continue  # nothing of it is left
        if skipped:
            layer = _share(layer)
            for name in skipped:
                if not hasattr(layer, name):
                    raise UnsupportedModel(f"layer {i} is {type(layer).__name__} without `{name}`; draft with another kind than reduced")
                setattr(layer, name, Nothing())
        made.append(layer)
    return made if head is None else [*made, head]


def make_norm(manifest: DraftManifest, weight: Tensor) -> nn.Module:
    """Return the draft's own final norm."""
    norm = RMSNorm(manifest.hidden_size, eps=manifest.rms_norm_eps)
    norm.weight.data.copy_(weight)
    return norm
