"""A worker's state without an engine, and random tokens of a step for it."""

from __future__ import annotations

import numpy as np
import torch
from sedac.engine.backends.choice import choose_backend
from sedac.engine.backends.cpu import CpuBackend
from sedac.engine.backends.levels import LevelTable
from sedac.engine.backends.tokens import DECIDES, OBSERVED, SOFT, Tokens
from sedac.engine.backends.torch import TorchBackend
from sedac.engine.step.state import State
from sedac.policy.layout import Layout
from sedac.probe.levels import Level
from sedac.probe.probe import LREProbe

CPU = torch.device("cpu")
LEVELS = tuple(Level(name=f"contextual-{s}", reduction="contextual", parameters_L=torch.full((6,), s / 100)) for s in (10, 20, 40))
SHARES = (0.1, 0.2, 0.4)
LAYOUT = Layout(
    num_layers=6, hidden_size=24, checkpoint_layers=(1, 3), probe_set="t", levels=("full", "skip", *(level.name for level in LEVELS)),
    probe_set_sha256="0" * 64, max_rank=11,
)  # fmt: skip
torch.manual_seed(0)
PROBES = {layer: LREProbe(24, 8).requires_grad_(False) for layer in LAYOUT.checkpoint_layers}


def make_state(use_native: bool) -> State:
    table = LevelTable(6, LEVELS, SHARES, 64, CPU)
    assert choose_backend(CPU, torch.float32) is CpuBackend, "build the kernels first: make setup"
    return State(LAYOUT, PROBES, table, max_num_tokens=16, device=CPU, make_backend=CpuBackend if use_native else TorchBackend)


def make_tokens(generator: torch.Generator, num_tokens: int) -> Tokens:
    def draw(*values: float) -> np.ndarray:
        return np.array(values)[torch.randint(len(values), (num_tokens,), generator=generator).numpy()]

    return Tokens(
        role_T=draw(0, DECIDES, DECIDES, DECIDES | SOFT, OBSERVED).astype(np.uint8),
        floor_T=draw(0, 0, 2, 3).astype(np.uint8),
        goal_T=draw(1, 2, 4).astype(np.uint8),
        scale_T=draw(0.0, 0.5, 1.0, 2.0).astype(np.float32),
        tier_T=draw(0, 1).astype(np.int64),
    )
