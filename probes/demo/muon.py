"""Muon: momentum whose matrix updates are orthogonalised, for the demo model's hidden matrices.

Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the 0.2 * sqrt(max(dim)) scale
is from J. Liu et al., "Muon is Scalable for LLM Training" (arXiv:2502.16982, eq. 4).
"""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor


def orthogonalise(matrices_BNM: Tensor, num_steps: int = 5) -> Tensor:
    """Map each matrix of the batch near the closest semi-orthogonal one by a quintic Newton-Schulz iteration in bf16."""
    x = matrices_BNM.bfloat16()
    wide = x.size(-2) <= x.size(-1)
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Muon over 2-D parameters; equal shapes are orthogonalised in one batch, and batches are shared out over the ranks."""

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update; every rank must hold the same averaged gradients."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                by_shape[p.shape].append(p)
            directions: dict[Tensor, Tensor] = {}
            for params in by_shape.values():
                for i, p in enumerate(params):
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    directions[p] = p.grad.lerp(buffer, group["momentum"]) if i % world == rank else torch.zeros_like(p)
                mine = params[rank::world]
                if mine:
                    for p, direction in zip(mine, orthogonalise(torch.stack([directions[p] for p in mine])), strict=True):
                        directions[p] = direction.float()
            if world > 1:  # each rank computed its share and zeros elsewhere: the sum is the whole
                flat = torch.cat([d.flatten() for d in directions.values()])
                dist.all_reduce(flat)
                parts = flat.split([p.numel() for p in directions])
                directions = {p: part.view_as(p) for p, part in zip(directions, parts, strict=True)}
            for p, direction in directions.items():
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(direction, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)
