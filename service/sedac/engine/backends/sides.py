"""What a backend reads of each side of a roll-out: the policy in force, and the candidate beside it.

The kernels read buffers whose addresses stay for the life of the engine; the step (engine/step/sides.py) writes into them between two
passes. C checkpoints, D hidden size, R the largest rank that can be loaded; a 2 is (evaluated, exited), a K one of a checkpoint's three knobs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sedac.engine.backends.tokens import OF_CANDIDATE
from sedac.policy.layout import Layout
from sedac.policy.model import Policy, Rule, Scope
from sedac.probe.cascade import Knobs
from sedac.probe.probe import LREProbe

_RULES = {"first": 0, "single": 0, "accumulate": 1}
_SCOPES = {"token": 0, "batch": 1}


class ProbeBuffer:
    """Room for one probe of any rank up to the largest, in fp32: (R + 1) * D * 4 bytes and a little."""

    def __init__(self, hidden_size: int, max_rank: int, device: torch.device) -> None:
        def make(*shape: int) -> Tensor:
            """Return zeros on the device, fp32."""
            return torch.zeros(shape, dtype=torch.float32, device=device)

        self.down_RD, self.norm_weight_R, self.norm_bias_R = make(max_rank, hidden_size), make(max_rank), make(max_rank)
        self.out_weight_1R, self.out_bias = make(1, max_rank), make(1)
        self.rank = torch.zeros(1, dtype=torch.int64, device=device)
        """Number of leading rows in use. 0 means that there is no probe."""
        self.probe: LREProbe | None = None
        """The probe, which reads the rows in use where they lie."""

    @property
    def tensors(self) -> list[Tensor]:
        """The weights, in the kernels' order."""
        return [self.down_RD, self.norm_weight_R, self.norm_bias_R, self.out_weight_1R, self.out_bias]

    def write(self, probe: LREProbe | None) -> None:
        """Copy a probe in, or take the one there out of use."""
        rank = probe.down.out_features if probe else 0
        self.rank.fill_(rank)
        views = {
            "down.weight": self.down_RD[:rank],
            "norm.weight": self.norm_weight_R[:rank],
            "norm.bias": self.norm_bias_R[:rank],
            "out.weight": self.out_weight_1R[:, :rank],
            "out.bias": self.out_bias,
        }
        for name, tensor in (probe.state_dict() if probe else {}).items():
            views[name].copy_(tensor)
        self.probe = LREProbe.from_tensors(views) if probe else None


class SideBuffers:
    """One side's probes, knobs and counts."""

    def __init__(self, number: int, layout: Layout, knobs_CK: Tensor, counts_C2: Tensor, device: torch.device) -> None:
        self.number = number
        """Number of the side: 0 is the policy in force, 1 the candidate."""
        self.role = OF_CANDIDATE * number
        """Bit of the side in its tokens' roles."""
        self.knobs_CK, self.counts_C2 = knobs_CK, counts_C2
        """Threshold, weight and target per checkpoint, and the counts of evaluated and exited tokens since the worker started."""
        self.probes = [ProbeBuffer(layout.hidden_size, layout.max_rank, device) for _ in layout.checkpoint_layers]
        self.rule: Rule
        self.scope: Scope
        self.decay: float
        self.is_strict: bool
        self.set_rule(Policy())

    def set_rule(self, policy: Policy) -> None:
        """Take how a policy decides; backends are told of it by `set_sides`."""
        self.rule, self.scope, self.decay, self.is_strict = policy.rule, policy.scope, policy.decay, policy.strict

    @property
    def rule_numbers(self) -> tuple[int, int, float]:
        """Rule (1: accumulate), scope (1: batch) and decay, as the kernels take them."""
        return _RULES[self.rule], _SCOPES[self.scope], self.decay

    def get_knobs(self, index: int) -> Knobs:
        """Return what checkpoint `index` decides by now."""
        threshold, weight, target = self.knobs_CK[index].tolist()
        return Knobs(threshold=threshold, weight=weight, target=target, rule=self.rule, scope=self.scope, decay=self.decay)
