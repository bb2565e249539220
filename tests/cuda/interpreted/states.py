"""A state on the device's forms or on plain torch, and random tokens of a step for it."""

from __future__ import annotations

import numpy as np
import torch
from sedac.engine.backends.cuda.backend import CudaBackend
from sedac.engine.backends.levels import LevelTable
from sedac.engine.backends.tokens import DECIDES, OBSERVED, OF_CANDIDATE, SOFT, Tokens
from sedac.engine.backends.torch import TorchBackend
from sedac.engine.step.state import State
from sedac.policy.layout import Layout
from sedac.probe.levels import Level
from sedac.probe.probe import LREProbe

CPU = torch.device("cpu")
D, LAYERS, ROOM = 40, 7, 48
LEVELS = (
    Level(name="contextual-10", reduction="contextual", parameters_L=torch.full((LAYERS,), 0.1)),
    Level(name="contextual-20", reduction="contextual", parameters_L=torch.full((LAYERS,), 0.2)),
    Level(name="width-50", reduction="width", parameters_L=torch.tensor([64, 32, 0, 32, 16, 64, 8], dtype=torch.int32)),
)
LAYOUT = Layout(
    num_layers=LAYERS, hidden_size=D, checkpoint_layers=(1, 3), probe_set="t", levels=("full", "skip", *(level.name for level in LEVELS)),
    probe_set_sha256="0" * 64, max_rank=19,
)  # fmt: skip


def make_state(rank: int, *, on_device: bool) -> State:
    torch.manual_seed(rank)
    probes = {layer: LREProbe(D, rank).requires_grad_(False) for layer in LAYOUT.checkpoint_layers}
    table = LevelTable(LAYERS, LEVELS, (0.1, 0.2, 0.5), 64, CPU)
    return State(LAYOUT, probes, table, max_num_tokens=ROOM, device=CPU, make_backend=CudaBackend if on_device else TorchBackend)


def make_tokens(generator: torch.Generator, count: int) -> Tokens:
    def draw(*values: float) -> np.ndarray:
        return np.array(values)[torch.randint(len(values), (count,), generator=generator).numpy()]

    roles = [0, DECIDES, DECIDES, DECIDES | SOFT, OBSERVED]
    return Tokens(
        role_T=draw(*roles, *(r | OF_CANDIDATE for r in roles)).astype(np.uint8),
        floor_T=draw(0, 0, 2, 3).astype(np.uint8), goal_T=draw(1, 2, 4).astype(np.uint8),
        scale_T=draw(0.0, 0.5, 1.0, 2.0).astype(np.float32), tier_T=np.zeros(count, dtype=np.int64),
    )  # fmt: skip
