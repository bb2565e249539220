"""What a reduced draft leaves out of the model, and the form in which the reference runs it. Called by the search and its measurements.

T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from sedac.policy.model import FULL
from torch import Tensor

from sedac_probes.calibration.reduced import Batch, Form, Plain

Kind = Literal["attention", "mlp"]
Part = tuple[Kind, int]
"""An attention or MLP, and its layer."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Layers, 0-based and in order, whose attention or MLP a draft leaves out, and the level of the MLPs that it runs."""

    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()
    level: str = FULL

    def toggle(self, part: Part) -> LeftOut:
        """Leave one more part out, or take it back in."""
        kind, layer = part
        layers = tuple(sorted(set(getattr(self, kind)) ^ {layer}))
        return replace(self, attention=layers) if kind == "attention" else replace(self, mlp=layers)

    def has(self, part: Part) -> bool:
        """Tell whether a part is left out."""
        return part[1] in getattr(self, part[0])

    @property
    def num_parts(self) -> int:
        """Parts left out."""
        return len(self.attention) + len(self.mlp)

    def describe(self) -> str:
        """Return a short name: attention 3 5, MLP 4, level."""
        parts = [f"{name} {' '.join(map(str, layers))}" for name, layers in (("attention", self.attention), ("MLP", self.mlp)) if layers]
        parts += [] if self.level == FULL else [self.level]
        return ", ".join(parts) or "nothing"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LeftOut:
        """Build from `to_dict`'s form."""
        return cls(attention=tuple(data["attention"]), mlp=tuple(data["mlp"]), level=data["level"])


class WithoutParts(Plain):
    """The model without these parts, its other MLPs in the form of the level: the reference of engine/drafting/model.py's layers."""

    def __init__(self, left_out: LeftOut, level: Form) -> None:
        self._attention, self._mlp, self._level = frozenset(left_out.attention), frozenset(left_out.mlp), level

    def begin(self, batch: Batch) -> None:
        """Forget the pass before."""
        self._level.begin(batch)

    def attends(self, layer: int) -> bool:
        """Attend where the attention is not left out."""
        return layer not in self._attention

    def compute(self, layer: int, x_TD: Tensor, mlp: Any) -> tuple[Tensor, Tensor]:
        """Compute the MLP at the level, or nothing."""
        if layer in self._mlp:
            return torch.zeros_like(x_TD), torch.zeros(x_TD.shape[0])
        return self._level.compute(layer, x_TD, mlp)
