"""What SEDAC keeps in a worker: the policy in force, the probes, every token's level in this step, and counters.

One `State` per model; the worker drives `apply`, `begin_step`, `end_step` and `get_stats`, the checkpoint and MLP
operators drive the rest. All of it runs on the thread that runs the model, so a policy never changes within a step.
Buffers keep their addresses for the life of the engine and are written in place; the native kernels read the same ones.
T tokens of the step, C checkpoints, V levels, D hidden size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sedac.engine import native
from sedac.engine.adaptation import Adapter
from sedac.engine.levels import NO_LEVEL, LevelTable
from sedac.engine.record import Recorder
from sedac.engine.tokens import DECIDES, OBSERVED, SOFT, HostViews, Tokens
from sedac.policy import MAX_LEVELS, Layout, Policy, validate
from sedac.probe.cascade import Knobs, decide, get_soft_ratio
from sedac.probe.probe import LREProbe
from sedac.stats import CheckpointStats, Stats, TierStats

_RULES = {"first": 0, "single": 0, "accumulate": 1}
_SCOPES = {"token": 0, "batch": 1}
_RATE_ALPHA = 0.05  # of the exit rates that status shows


class State:
    """The worker's SEDAC state; see the module's docstring."""

    def __init__(
        self, layout: Layout, probes: dict[int, LREProbe], table: LevelTable, *, max_num_tokens: int, device: torch.device, allow_native: bool = True
    ) -> None:
        self.layout, self.table = layout, table
        self.probes = {layer: probe.to(device) for layer, probe in probes.items()}
        self.recorder: Recorder | None = None
        self.policy = Policy()
        self.revision = 0
        self.adapter = Adapter(len(layout.checkpoint_layers))
        num_checkpoints = len(layout.checkpoint_layers)
        self.index_of_layer = {layer: i for i, layer in enumerate(layout.checkpoint_layers)}

        def make(dtype: torch.dtype, *shape: int, fill: float = 0) -> Tensor:
            return torch.full(shape, fill, dtype=dtype, device=device)

        self.level_T = make(torch.uint8, max_num_tokens)
        """of the layers from here on; rows past the step's tokens stay 0"""
        self._role_T, self._done_T, self._goal_T = (make(torch.uint8, max_num_tokens) for _ in range(3))
        self._scale_T, self._confidence_T, self.saved_T = (make(torch.float32, max_num_tokens) for _ in range(3))
        self._risk_CT = make(torch.float32, max(1, num_checkpoints), max_num_tokens, fill=float("nan"))
        self._active = make(torch.uint8, 1)
        self._knobs_CK = make(torch.float32, max(1, num_checkpoints), 3)
        """threshold, weight, target"""
        self._counts_C2 = make(torch.int64, max(1, num_checkpoints), 2)
        """evaluated, exited, since the worker started"""
        self.is_active = False
        """whether any token of the running step is or may get reduced"""
        self._host = HostViews(
            written=[self.level_T, self._role_T, self._goal_T, self._scale_T],
            cleared=[self.level_T, self._done_T, self._confidence_T, self.saved_T],
            read=[self.saved_T, self._done_T, self._risk_CT],
            active=self._active,
        )
        self._has_thresholds = False
        self._num_tokens = 0
        self._tokens: Tokens | None = None
        self.last_tokens: Tokens | None = None
        """of the last step in which anything was decided or observed, with its risks (C, T), NaN where not evaluated"""
        self.risk_CT = np.zeros((max(1, num_checkpoints), 0), dtype=np.float32)
        self._step_revision = 0
        self._totals = {"num_steps": 0, "num_torn_steps": 0, "num_tokens": 0, "num_decode_tokens": 0}
        self._num_saved = 0.0
        self._exit_rates = [0.0] * max(1, num_checkpoints)
        self._last_counts = self._counts_C2.tolist()
        self._tier_rows: dict[str, int] = {}
        self._tier_totals = np.zeros((0, 3))
        self.native = allow_native and device.type == "cpu" and native.load()
        if self.native:
            self._register()

    def _register(self) -> None:
        ops = torch.ops.sedac
        token_buffers = [self.level_T, self._role_T, self._done_T, self._goal_T, self._scale_T, self._confidence_T, self.saved_T]
        ops.set_buffers([*token_buffers, self._risk_CT, self._active, self.table.ladder_VV, self.table.share_V])
        for layer, i in self.index_of_layer.items():
            probe = self.probes.get(layer)
            if probe is not None:
                weights = [probe.down.weight, probe.norm.weight, probe.norm.bias, probe.out.weight, probe.out.bias]
                ops.add_checkpoint(i, [w.detach().contiguous() for w in weights], self._knobs_CK[i], self._counts_C2[i])

    def apply(self, policy: Policy, revision: int) -> None:
        """Put a policy into force from the next step on; whether its certificate fits is the agent's to check, which knows the weights.

        Raises:
            PolicyInvalid: the old policy stays in force.
        """
        validate(replace(policy, certificate=None), self.layout)
        self.policy, self.revision = policy, revision
        knobs = torch.zeros_like(self._knobs_CK)
        if policy.enabled:
            for c in policy.checkpoints:
                knobs[self.index_of_layer[c.layer]] = torch.tensor([c.threshold, c.weight, c.target])
        self.adapter.configure(policy, knobs[:, 0].tolist(), self.index_of_layer)
        self._knobs_CK.copy_(knobs)
        self._write_thresholds()
        self._has_thresholds = bool((knobs[:, 0] > 0).any())
        for tier in ("exact", *(t.name for t in policy.get_tiers())):
            self.get_tier_row(tier)
        if self.native:
            torch.ops.sedac.set_rule(_RULES[policy.rule], _SCOPES[policy.scope], policy.decay)

    def _write_thresholds(self) -> None:
        if self.adapter.is_on:
            self._knobs_CK[:, 0] = torch.tensor(self.adapter.thresholds, dtype=torch.float32)

    def get_tier_row(self, tier: str) -> int:
        """Return the row of a tier's counters, made when first asked for."""
        if tier not in self._tier_rows:
            self._tier_rows[tier] = len(self._tier_rows)
            self._tier_totals = np.vstack([self._tier_totals, np.zeros((1, 3))])
        return self._tier_rows[tier]

    def begin_step(self, num_tokens: int, tokens: Tokens | None) -> None:
        """Start a forward pass over `num_tokens` tokens; None: all of them in full."""
        self._num_tokens, self._step_revision = num_tokens, self.revision
        previous, self._tokens = self.last_tokens, tokens
        self.is_active = False
        if tokens is None:
            return
        self._totals["num_decode_tokens"] += tokens.num_decides
        self.is_active = tokens.has_floor or (self._has_thresholds and (tokens.num_decides > 0 or bool(tokens.role_T.any())))
        if self.is_active:
            self._host.write(tokens, num_tokens, is_new=tokens is not previous)

    @property
    def num_tokens(self) -> int:
        """Tokens of the running step; 0 between steps, where warm-up and dummy passes run."""
        return self._num_tokens

    def end_step(self) -> np.ndarray[Any, Any] | None:
        """Finish the pass: count it and clear what belongs to it alone; returns the MLPs saved per token (T,), None: none."""
        totals, num_tokens, tokens = self._totals, self._num_tokens, self._tokens
        totals["num_steps"] += 1
        totals["num_tokens"] += num_tokens
        totals["num_torn_steps"] += self._step_revision != self.revision
        saved_T = None
        if self.is_active:
            assert tokens is not None
            saved_T, done_T, self.risk_CT = self._host.read(num_tokens)
            self._num_saved += float(saved_T.sum())
            self._count_tiers(tokens, saved_T, done_T)
            self.last_tokens = tokens
            if tokens.num_decides:
                self._follow_rates(tokens)
            self.is_active = False
        elif tokens is not None:
            self._count_tiers(tokens, None, None)
        self._tokens, self._num_tokens = None, 0
        return saved_T

    def _count_tiers(self, tokens: Tokens, saved_T: np.ndarray[Any, Any] | None, done_T: np.ndarray[Any, Any] | None) -> None:
        size, counts = len(self._tier_totals), tokens.tier_counts
        self._tier_totals[: len(counts), 0] += counts
        if saved_T is not None and done_T is not None:
            self._tier_totals[:, 1] += np.bincount(tokens.tier_T, weights=done_T, minlength=size)
            self._tier_totals[:, 2] += np.bincount(tokens.tier_T, weights=saved_T, minlength=size)

    def _follow_rates(self, tokens: Tokens) -> None:
        """Take the step's exits into the moving rates and, where adaptation is on, its risks into the thresholds."""
        counts = self._counts_C2.tolist()
        for i, (now, before) in enumerate(zip(counts, self._last_counts, strict=True)):
            if now[0] > before[0]:
                self._exit_rates[i] += _RATE_ALPHA * ((now[1] - before[1]) / (now[0] - before[0]) - self._exit_rates[i])
        self._last_counts = counts
        if not self.adapter.is_on:
            return
        for i, risk_T in enumerate(self.risk_CT):
            seen_T = tokens.decides_T & ~np.isnan(risk_T)
            self.adapter.add(i, risk_T[seen_T] / np.maximum(tokens.scale_T[seen_T], 1e-9))
        if self.adapter.update():
            self._write_thresholds()

    def is_watching(self, layer: int) -> bool:
        """Whether the checkpoint after `layer` has anything to do in this step."""
        return self.recorder is not None or self.is_active

    def observe(self, layer: int, hidden_TD: Tensor, residual_TD: Tensor | None = None) -> None:
        """Run the checkpoint after `layer` on the residual stream (T, D), given whole or in two parts, and set the levels of the confident."""
        if self.recorder is None and self.native and self.is_active:
            torch.ops.sedac.checkpoint_parts(hidden_TD, residual_TD, self.level_T, self.index_of_layer[layer])
            return
        stream_TD = hidden_TD.float() if residual_TD is None else hidden_TD.float() + residual_TD.float()
        if self.recorder is not None and self._num_tokens:
            self.recorder.add_stream(layer, stream_TD[: self._num_tokens])
        if self.is_active and layer in self.probes:
            self._observe(layer, self.index_of_layer[layer], stream_TD)

    def _observe(self, layer: int, index: int, stream_TD: Tensor) -> None:
        """Do in plain torch what the native checkpoint does."""
        num_tokens = self._num_tokens
        threshold, weight, target = self._knobs_CK[index].tolist()
        role_T = self._role_T[:num_tokens]
        decides_T = (role_T & DECIDES > 0) & (self._done_T[:num_tokens] == 0) & (threshold > 0)
        seen = (decides_T | (role_T & OBSERVED > 0)).nonzero().squeeze(1)
        if not seen.numel():
            return
        self._risk_CT[index, seen] = self.probes[layer](stream_TD[seen])
        rows = decides_T.nonzero().squeeze(1)
        if not rows.numel():
            return
        policy = self.policy
        knobs = Knobs(threshold=threshold, weight=weight, target=target, rule=policy.rule, scope=policy.scope, decay=policy.decay)
        sure_N, confidence_N = decide(self._risk_CT[index, rows], self._scale_T[rows], self._confidence_T[rows], knobs)
        self._confidence_T[rows] = confidence_N
        rows, confidence_N = rows[sure_N], confidence_N[sure_N]
        wanted_N, soft_N = self._goal_T[rows], self._role_T[rows] & SOFT > 0
        if soft_N.any():
            wanted_N = torch.where(soft_N, self._choose_soft(wanted_N, get_soft_ratio(confidence_N)), wanted_N)
        share_V = self.table.share_V
        self.level_T[rows] = torch.where(share_V[wanted_N.long()] > share_V[self.level_T[rows].long()], wanted_N, self.level_T[rows])
        final = rows[~soft_N | (self.level_T[rows] == self._goal_T[rows])]
        self._done_T[final] = 1
        self._counts_C2[index] += torch.tensor([int(decides_T.sum()), final.numel()], device=self._counts_C2.device)

    def _choose_soft(self, goal_N: Tensor, ratio_N: Tensor) -> Tensor:
        steps_NV = self.table.ladder_VV[goal_N.long()]
        shares_NV = torch.where(steps_NV == NO_LEVEL, torch.inf, self.table.share_V[steps_NV.long().clamp(max=MAX_LEVELS - 1)])
        count_N = (shares_NV <= ratio_N[:, None]).sum(1)
        picked_N = steps_NV.gather(1, (count_N - 1).clamp(min=0)[:, None]).squeeze(1)
        return torch.where(count_N > 0, picked_N, 0).to(torch.uint8)

    def get_stats(self) -> Stats:
        """Return the totals since the worker started."""
        totals, num_layers = self._totals, self.layout.num_layers
        counts, thresholds = self._counts_C2.tolist(), self._knobs_CK[:, 0].tolist()
        return Stats(
            active_revision=self.revision,
            **totals,
            num_mlp_blocks_skipped=self._num_saved,
            num_mlp_blocks_computed=totals["num_tokens"] * num_layers - self._num_saved,
            checkpoints=tuple(
                CheckpointStats(
                    layer=layer, num_evaluated=counts[i][0], num_exited=counts[i][1], threshold=thresholds[i], exit_rate=self._exit_rates[i]
                )
                for layer, i in self.index_of_layer.items()
            ),
            tiers=tuple(
                TierStats(name=name, num_tokens=int(tokens), num_exited=int(exited), num_mlp_blocks_computed=float(tokens * num_layers - saved))
                for name, (tokens, exited, saved) in zip(self._tier_rows, self._tier_totals.tolist(), strict=True)
            ),
            num_adaptations=self.adapter.num_updates,
        )
