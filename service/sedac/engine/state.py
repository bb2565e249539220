"""What SEDAC keeps in a worker: the policy in force, the probes, which tokens exited in this step, and counters.

One `State` per model; the worker drives `apply`, `begin_step`, `end_step` and `get_stats`, the checkpoint and MLP
operators drive the rest. All of it runs on the thread that runs the model, so a policy never changes within a step.
Buffers keep their addresses for the life of the engine and are written in place.
T tokens of the step, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sedac.engine.record import Recorder
from sedac.policy import Layout, Policy, validate
from sedac.probe.cascade import choose_exits
from sedac.probe.probe import LREProbe
from sedac.stats import CheckpointStats, Stats


@dataclass
class _CheckpointCounts:
    num_evaluated: int = 0
    num_exited: int = 0


class State:
    """The worker's SEDAC state; see the module's docstring."""

    def __init__(self, layout: Layout, probes: dict[int, LREProbe], *, max_num_tokens: int, device: torch.device) -> None:
        self.layout = layout
        self.probes = {layer: probe.to(device) for layer, probe in probes.items()}
        self.recorder: Recorder | None = None
        self.exited_T = torch.zeros(max_num_tokens, dtype=torch.bool, device=device)
        """True: the token exited; rows past the step's tokens stay False"""
        self.kept_rows: Tensor | None = None
        """row numbers that still compute their MLPs; None: all of them"""
        self.policy = Policy()
        self.revision = 0
        self._thresholds: dict[int, float] = {}
        self._may_exit_T: Tensor | None = None
        self._active = False
        self._num_tokens = 0
        self._step_revision = 0
        self._stats = {"num_steps": 0, "num_torn_steps": 0, "num_tokens": 0, "num_decode_tokens": 0, "num_mlp_blocks_skipped": 0}
        self._counts = {layer: _CheckpointCounts() for layer in layout.checkpoint_layers}

    def apply(self, policy: Policy, revision: int) -> None:
        """Put a policy into force from the next step on.

        Raises:
            PolicyInvalid: the old policy stays in force.
        """
        validate(policy, self.layout)
        self.policy, self.revision = policy, revision
        self._thresholds = {c.layer: c.threshold for c in policy.checkpoints if c.threshold > 0} if policy.enabled else {}

    @property
    def reduces_prompts(self) -> bool:
        """Whether prompt tokens may exit too."""
        return self.policy.phase == "all"

    def begin_step(self, num_tokens: int, may_exit_T: Tensor | None) -> None:
        """Start a forward pass over `num_tokens` tokens; `may_exit_T` (T,) bool, None: no token may exit."""
        self._num_tokens, self._step_revision = num_tokens, self.revision
        self._may_exit_T = may_exit_T
        self._active = may_exit_T is not None and bool(self._thresholds)
        if may_exit_T is not None:
            self._stats["num_decode_tokens"] += int(may_exit_T.sum())

    def end_step(self) -> None:
        """Finish the pass: count it and clear what belongs to it alone."""
        stats = self._stats
        stats["num_steps"] += 1
        stats["num_tokens"] += self._num_tokens
        stats["num_torn_steps"] += self._step_revision != self.revision
        self._active = False
        if self.kept_rows is not None:
            self.kept_rows = None
            self.exited_T.zero_()

    def is_watching(self, layer: int) -> bool:
        """Whether the checkpoint after `layer` has anything to do in this step."""
        return self.recorder is not None or (self._active and layer in self._thresholds)

    def observe(self, layer: int, stream_TD: Tensor) -> None:
        """Run the checkpoint after `layer` on the residual stream (T, D), fp32, and mark the tokens that exit."""
        if self.recorder is not None and self._num_tokens:
            self.recorder.add_stream(layer, stream_TD[: self._num_tokens])
        if not self._active or layer not in self._thresholds:
            return
        num_tokens = self._num_tokens
        assert self._may_exit_T is not None
        rows = (self._may_exit_T & ~self.exited_T[:num_tokens]).nonzero().squeeze(1)
        if not rows.numel():
            return
        everyone = rows.numel() == num_tokens
        risk_N = self.probes[layer](stream_TD[slice(num_tokens) if everyone else rows])  # a slice saves the copy
        exiting = rows[choose_exits(risk_N, self._thresholds[layer], self.policy.scope)]
        counts, num_exiting = self._counts[layer], exiting.numel()
        counts.num_evaluated += rows.numel()
        if num_exiting:
            counts.num_exited += num_exiting
            self._stats["num_mlp_blocks_skipped"] += num_exiting * (self.layout.num_layers - 1 - layer)
            self.exited_T[exiting] = True
            self.kept_rows = (~self.exited_T[:num_tokens]).nonzero().squeeze(1)

    def get_stats(self) -> Stats:
        """Return the totals since the worker started."""
        stats = self._stats
        return Stats(
            active_revision=self.revision,
            **stats,
            num_mlp_blocks_computed=stats["num_tokens"] * self.layout.num_layers - stats["num_mlp_blocks_skipped"],
            checkpoints=tuple(CheckpointStats(layer=layer, **vars(counts)) for layer, counts in self._counts.items()),
        )
