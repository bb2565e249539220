"""The backend in plain torch: for devices and types without kernels of their own, and where the C++ ones were not built.

Its checkpoint does what kernels/checkpoint.cpp does; its MLPs are in torch_mlp.py.
T tokens of the step, N rows of it, D hidden size, V levels, C checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sedac.engine.backends.base import Action, Backend, Left
from sedac.engine.backends.kinds import KINDS
from sedac.engine.backends.levels import NO_LEVEL, LevelTable
from sedac.engine.backends.tokens import DECIDES, OBSERVED, OF_CANDIDATE, SOFT, Array, TokenBuffers, Tokens
from sedac.policy.model import MAX_LEVELS
from sedac.probe.cascade import decide, get_soft_ratio
from sedac.probe.levels import Neurons

if TYPE_CHECKING:
    from sedac.engine.backends.sides import SideBuffers


class TorchBackend(Backend):
    """Plain torch, level by level; what a pass left is counted as it ends."""

    label: ClassVar[str] = "plain torch"
    kinds: ClassVar[frozenset[str]] = frozenset(kind.name for kind in KINDS)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._in_force: Sequence[SideBuffers] = self.sides[:1]
        self._saved_T: Array | None = None

    def attach_mlp(self, module: Any, name: str, layer: int, neurons: Neurons | None, *, scores_activation: bool, lora: bool) -> None:
        """Gate an MLP; see `Backend`."""
        from sedac.engine.backends.torch_mlp import TorchMlp  # needs vLLM, which deciding does not (benchmarks/cuda on a bare machine)

        self.mlps.append(TorchMlp(self, module, name, layer, neurons, scores_activation=scores_activation, lora=lora))

    def set_sides(self, sides: Sequence[SideBuffers]) -> None:
        """Let these sides decide from the next pass on."""
        self._in_force = tuple(sides)

    def begin(self, num_tokens: int, tokens: Tokens | None, *, is_new: bool) -> None:
        """Start a pass."""
        self.num_tokens, self.is_active = num_tokens, tokens is not None
        if tokens is not None:
            self.buffers.write(tokens, num_tokens, is_new=is_new)

    def observe(self, index: int, hidden_TD: Tensor, residual_TD: Tensor | None) -> None:
        """Run checkpoint `index` for each side in force."""
        if not self.is_active:
            return
        stream_TD = hidden_TD.float() if residual_TD is None else hidden_TD.float() + residual_TD.float()
        for side in self._in_force:
            observe(self.buffers, self.table, side, index, stream_TD[: self.num_tokens])

    def end(self, tokens: Tokens | None) -> Array | None:
        """Finish the pass and count it."""
        if self.is_active:
            left = Left(*self.buffers.read(self.num_tokens))
            self._saved_T = left.saved_T
            self._count(tokens, left)
            self.is_active = False
        else:
            self._saved_T = None
            if tokens is not None:
                self._count(tokens, None)
        self.num_tokens = 0
        return self._saved_T

    def then(self, action: Action, *arguments: Any) -> None:
        """Call `action` at once: the last pass is counted."""
        action(*arguments, self._saved_T)

    def settle(self) -> None:
        """Nothing waits to be counted."""


def observe(buffers: TokenBuffers, table: LevelTable, side: SideBuffers, index: int, stream_TD: Tensor) -> None:
    """Run checkpoint `index` of one side on its tokens' residual stream (T, D), fp32, and set the levels of the confident."""
    probe, knobs, num_tokens = side.probes[index].probe, side.get_knobs(index), stream_TD.shape[0]
    if probe is None:
        return
    role_T = buffers.role_T[:num_tokens]
    mine_T = role_T & OF_CANDIDATE == side.role
    decides_T = mine_T & (role_T & DECIDES > 0) & (buffers.done_T[:num_tokens] == 0) & (knobs.threshold > 0)
    seen = (decides_T | (mine_T & (role_T & OBSERVED > 0))).nonzero().squeeze(1)
    if not seen.numel():
        return
    buffers.risk_CT[index, seen] = probe(stream_TD[seen])
    rows = decides_T.nonzero().squeeze(1)
    if not rows.numel():
        return
    sure_N, confidence_N = decide(buffers.risk_CT[index, rows], buffers.scale_T[rows], buffers.confidence_T[rows], knobs)
    buffers.confidence_T[rows] = confidence_N
    rows, confidence_N = rows[sure_N], confidence_N[sure_N]
    level_T, goal_T, share_V = buffers.level_T, buffers.goal_T, table.share_V
    wanted_N, soft_N = goal_T[rows], role_T[rows] & SOFT > 0
    if soft_N.any():
        wanted_N = torch.where(soft_N, _choose_soft(table, wanted_N, get_soft_ratio(confidence_N)), wanted_N)
    level_T[rows] = torch.where(share_V[wanted_N.long()] > share_V[level_T[rows].long()], wanted_N, level_T[rows])
    final = rows[~soft_N | (level_T[rows] == goal_T[rows])]
    buffers.done_T[final] = 1
    side.counts_C2[index] += torch.tensor([int(decides_T.sum()), final.numel()], device=side.counts_C2.device)


def _choose_soft(table: LevelTable, goal_N: Tensor, ratio_N: Tensor) -> Tensor:
    steps_NV = table.ladder_VV[goal_N.long()]
    shares_NV = torch.where(steps_NV == NO_LEVEL, torch.inf, table.share_V[steps_NV.long().clamp(max=MAX_LEVELS - 1)])
    count_N = (shares_NV <= ratio_N[:, None]).sum(1)
    picked_N = steps_NV.gather(1, (count_N - 1).clamp(min=0)[:, None]).squeeze(1)
    return torch.where(count_N > 0, picked_N, 0).to(torch.uint8)
