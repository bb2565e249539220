"""What the native checkpoint does (kernels/checkpoint.cpp), in plain torch: for other devices, and where the kernels were not built.

T tokens of the step, N rows of it, V levels, C checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sedac.engine.backends.levels import NO_LEVEL, LevelTable
from sedac.engine.step.arms import Arm
from sedac.engine.step.tokens import CANARY_ARM, DECIDES, OBSERVED, SOFT, TokenBuffers
from sedac.policy.model import MAX_LEVELS
from sedac.probe.cascade import decide, get_soft_ratio


def observe(buffers: TokenBuffers, table: LevelTable, arm: Arm, index: int, stream_TD: Tensor) -> None:
    """Run checkpoint `index` of one arm on its tokens' residual stream (T, D), fp32, and set the levels of the confident."""
    probe, knobs, num_tokens = arm.probes[index].probe, arm.get_knobs(index), stream_TD.shape[0]
    if probe is None:
        return
    role_T = buffers.role_T[:num_tokens]
    mine_T = role_T & CANARY_ARM == arm.role
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
    arm.counts_C2[index] += torch.tensor([int(decides_T.sum()), final.numel()], device=arm.counts_C2.device)


def _choose_soft(table: LevelTable, goal_N: Tensor, ratio_N: Tensor) -> Tensor:
    steps_NV = table.ladder_VV[goal_N.long()]
    shares_NV = torch.where(steps_NV == NO_LEVEL, torch.inf, table.share_V[steps_NV.long().clamp(max=MAX_LEVELS - 1)])
    count_N = (shares_NV <= ratio_N[:, None]).sum(1)
    picked_N = steps_NV.gather(1, (count_N - 1).clamp(min=0)[:, None]).squeeze(1)
    return torch.where(count_N > 0, picked_N, 0).to(torch.uint8)
