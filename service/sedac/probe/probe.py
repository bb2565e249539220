"""LREProbe: reads the residual stream after a decoder layer and predicts the token's risk.

Used by the engine (serving) and by the workshop (training), so that the two cannot drift apart.
T tokens, D hidden size, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional


class LREProbe(nn.Module):
    """Linear(D -> R, no bias), LayerNorm(R), Linear(R -> 1), Softplus; always in fp32.

    A probe in bf16 flips decisions near the threshold and produces ties, so the stream is cast up.
    """

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        # dtype given: an engine builds models under its own default dtype
        self.down = nn.Linear(hidden_size, rank, bias=False, dtype=torch.float32)
        self.norm = nn.LayerNorm(rank, dtype=torch.float32)
        self.out = nn.Linear(rank, 1, dtype=torch.float32)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LREProbe:
        """Build a probe for serving that reads these very tensors, named as in its `state_dict`; fp32, any one device.

        It initialises nothing: that would draw from the random numbers that vLLM samples with.
        """
        rank, hidden_size = tensors["down.weight"].shape
        with torch.device("meta"):
            probe = cls(hidden_size, rank)
        probe.eval().requires_grad_(False).load_state_dict(tensors, assign=True)
        return probe

    def forward(self, stream_TD: Tensor) -> Tensor:
        """Return the risk (T,), fp32, >= 0; low means safe to spend less."""
        risk_T1: Tensor = functional.softplus(self.out(self.norm(self.down(stream_TD.float()))))
        return risk_T1.squeeze(-1)
