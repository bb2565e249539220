"""What SEDAC keeps in a worker: the arms in force, the probe sets, every token's level in this step, and counters.

One `State` per model; the worker drives `apply`, `begin_step`, `end_step` and `get_stats`, the checkpoint and MLP
operators drive the rest. All of it runs on the thread that runs the model, so neither a policy nor a probe changes within a step.
Buffers keep their addresses for the life of the engine and are written in place; the native kernels read the same ones.
T tokens of the step, C checkpoints, V levels, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sedac.contract.stats import CheckpointStats, Stats, TierStats
from sedac.engine.backends import native, plain
from sedac.engine.backends.levels import LevelTable
from sedac.engine.step.arms import ARMS, Arm
from sedac.engine.step.probe_sets import Loaded, ProbeSets
from sedac.engine.step.record import Recorder
from sedac.engine.step.tokens import CANARY_ARM, Array, TokenBuffers, Tokens
from sedac.errors import FieldViolation, PolicyInvalid
from sedac.policy.check import validate
from sedac.policy.layout import Layout, ProbeSetSummary
from sedac.policy.model import Canary, Policy
from sedac.probe.probe import LREProbe

if TYPE_CHECKING:
    from sedac.engine.backends.cuda.device import DeviceForms


class State:
    """The worker's SEDAC state; see the module's docstring."""

    def __init__(
        self, layout: Layout, probes: dict[int, LREProbe], table: LevelTable, *, max_num_tokens: int, device: torch.device, allow_native: bool = True
    ) -> None:
        """`probes` are those attached from the start; none may have a rank over the layout's `max_rank`."""
        self.layout, self.table = layout, table
        self.probe_sets = ProbeSets(layout=layout, attached=Loaded(sha256=layout.probe_set_sha256, probes=probes))
        self.recorder: Recorder | None = None
        self.revision = 0
        self.rollout = 0
        """whose candidate is in force beside the policy; 0: none"""
        self.version = 0
        """counts what came into force"""
        self.index_of_layer = {layer: i for i, layer in enumerate(layout.checkpoint_layers)}
        num_checkpoints = max(1, len(layout.checkpoint_layers))
        self.buffers = TokenBuffers(num_checkpoints, max_num_tokens, device)
        self.level_T, self.saved_T = self.buffers.level_T, self.buffers.saved_T
        knobs_ACK = torch.zeros(len(ARMS), num_checkpoints, 3, dtype=torch.float32, device=device)
        self._counts_AC2 = torch.zeros(len(ARMS), num_checkpoints, 2, dtype=torch.int64, device=device)
        self.stable, self.canary = (Arm(i, layout, knobs_ACK[i], self._counts_AC2[i], device) for i in range(len(ARMS)))
        self.stable.configure(Policy(), self.probe_sets.attached)
        self.is_active = False
        """whether any token of the running step is or may get reduced"""
        self._num_tokens = 0
        self._tokens: Tokens | None = None
        self.last_tokens: Tokens | None = None
        """of the last step in which anything was decided or observed"""
        self.observed_tokens: Tokens | None = None
        """of the last step whose results the host has read, with its risks (C, T), NaN where not evaluated"""
        self.risk_CT = np.zeros((num_checkpoints, 0), dtype=np.float32)
        self._step_version = 0
        self._totals = {"num_steps": 0, "num_torn_steps": 0, "num_tokens": 0, "num_decode_tokens": 0}
        self._num_saved = 0.0
        self._tier_rows: dict[str, int] = {}
        self._tier_totals = np.zeros((0, 3))
        self.native = allow_native and device.type == "cpu" and native.load()
        if self.native:
            self.register()
        self.device_forms: DeviceForms | None = None
        """on a GPU: decides and computes there, inside CUDA graphs too"""
        if device.type == "cuda":
            self.use_device_forms()

    def use_device_forms(self) -> None:
        """Let the Triton kernels decide; needs Triton, whose import the CPU is spared."""
        from sedac.engine.backends.cuda.device import DeviceForms

        self.device_forms = DeviceForms(self.buffers, self.table, (self.stable, self.canary), self._counts_AC2, self.level_T.device)

    def register(self) -> None:
        """Point the native kernels at this state; they know one, the last that was registered."""
        torch.ops.sedac.set_buffers([*self.buffers.tensors, self.table.ladder_VV, self.table.share_V])
        for arm in (self.stable, self.canary):
            arm.register()
            arm.set_rule()

    @property
    def arms(self) -> tuple[Arm, ...]:
        """Those in force."""
        return (self.stable, self.canary) if self.rollout else (self.stable,)

    def get_arm(self, rollout: int) -> Arm:
        """Return the arm of a request that was stamped with a roll-out's number, 0: with none."""
        return self.canary if rollout and rollout == self.rollout else self.stable

    @property
    def is_enabled(self) -> bool:
        """Whether any policy in force may reduce anything."""
        return any(arm.policy.enabled for arm in self.arms)

    def apply(self, policy: Policy, revision: int, canary: Canary | None = None) -> None:
        """Put a policy, a roll-out's candidate beside it, and their probe sets into force from the next step on.

        Whether a certificate fits is the agent's to check, which knows the weights.

        Raises:
            PolicyInvalid: all stays as it was; the candidate's fields begin with `canary.policy.`.
        """
        self.settle()
        summaries = self.probe_sets.get_summaries()
        bad = self._find_violations(policy, summaries)
        if canary is not None:
            bad += [FieldViolation(f"canary.policy.{v.field}", v.description) for v in self._find_violations(canary.policy, summaries)]
            if canary.rollout <= 0:
                bad.append(FieldViolation("canary.rollout", f"{canary.rollout} is not over 0; give the roll-out's number"))
        if bad:
            raise PolicyInvalid(bad)
        wanted = {arm: self.probe_sets.find(p.probe_set) for arm, p in (("stable", policy), ("canary", canary and canary.policy)) if p}
        if canary is None and self.rollout and policy == self.canary.policy:
            self.stable.swap_learned(self.canary)  # promoted: the thresholds that it has adapted go on
        self.stable.configure(policy, wanted["stable"])
        if canary is None:
            self.canary.clear()
        else:
            self.canary.configure(canary.policy, wanted["canary"], is_new=canary.rollout != self.rollout)
        self.revision, self.rollout, self.version = revision, canary.rollout if canary else 0, self.version + 1
        self.probe_sets.drop_unused({loaded.sha256 for loaded in wanted.values()})
        for arm in self.arms:
            for tier in ("exact", *(t.name for t in arm.policy.get_tiers())):
                self.get_tier_row(tier)
            if self.native:
                arm.set_rule()
            if self.device_forms is not None:
                self.device_forms.set_rule(arm.number, *arm.rule)

    def _find_violations(self, policy: Policy, summaries: Mapping[str, ProbeSetSummary]) -> list[FieldViolation]:
        try:
            validate(replace(policy, certificate=None), self.layout, summaries)
        except PolicyInvalid as error:
            return list(error.violations)
        return []

    def get_tier_row(self, tier: str) -> int:
        """Return the row of a tier's counters, made when first asked for."""
        if tier not in self._tier_rows:
            self._tier_rows[tier] = len(self._tier_rows)
            self._tier_totals = np.vstack([self._tier_totals, np.zeros((1, 3))])
        return self._tier_rows[tier]

    def begin_step(self, num_tokens: int, tokens: Tokens | None) -> None:
        """Start a forward pass over `num_tokens` tokens; None: all of them in full."""
        if self.device_forms is not None:
            self.settle(keep=1)
        self._num_tokens, self._step_version = num_tokens, self.version
        previous, self._tokens = self.last_tokens, tokens
        self.is_active = False
        if tokens is None:
            return
        self._totals["num_decode_tokens"] += tokens.num_decides
        has_thresholds = any(arm.has_thresholds for arm in self.arms)
        self.is_active = tokens.has_floor or (has_thresholds and (tokens.num_decides > 0 or bool(tokens.role_T.any())))
        if self.is_active:
            if self.device_forms is not None:
                self.device_forms.take(tokens, num_tokens, is_new=tokens is not previous)
            else:
                self.buffers.write(tokens, num_tokens, is_new=tokens is not previous)

    @property
    def num_tokens(self) -> int:
        """Tokens of the running step; 0 between steps, where warm-up and dummy passes run."""
        return self._num_tokens

    def end_step(self) -> Array | None:
        """Finish the pass: count it and clear what belongs to it alone; returns the MLPs saved per token (T,), None: none.

        On a GPU always None: the pass may still run, and what it saved is counted later (`settle`).
        """
        totals, num_tokens, tokens = self._totals, self._num_tokens, self._tokens
        totals["num_steps"] += 1
        totals["num_tokens"] += num_tokens
        totals["num_torn_steps"] += self._step_version != self.version
        saved_T = None
        if self.device_forms is not None:
            self.device_forms.end(tokens, num_tokens, is_active=self.is_active)
            self.last_tokens = tokens if self.is_active else self.last_tokens
            self.is_active = False
        elif self.is_active:
            assert tokens is not None
            saved_T, done_T, risk_CT = self.buffers.read(num_tokens)
            self.last_tokens = tokens
            self._count(tokens, saved_T, done_T, risk_CT)
            self.is_active = False
        elif tokens is not None:
            self._count_tiers(tokens, None, None)
        self._tokens, self._num_tokens = None, 0
        return saved_T

    def settle(self, *, keep: int = 0) -> None:
        """On a GPU: count what all passes but the last `keep` have left; elsewhere nothing waits to be counted."""
        for step in self.device_forms.waiting.take(keep) if self.device_forms is not None else ():
            saved_T = None
            if step.unpack is not None:
                assert step.tokens is not None
                saved_T, done_T, risk_CT, counts_AC2 = step.read()
                self._count(step.tokens, saved_T, done_T, risk_CT, counts_AC2.tolist())
            elif step.tokens is not None:
                self._count_tiers(step.tokens, None, None)
            for action in step.then:
                action(saved_T)

    def _count(self, tokens: Tokens, saved_T: Array, done_T: Array, risk_CT: Array, counts: list[Any] | None = None) -> None:
        """Count one pass and let the arms learn from it; `counts`: each arm's totals after it, None: as they are."""
        self.risk_CT, self.observed_tokens = risk_CT, tokens
        self._num_saved += float(saved_T.sum())
        self._count_tiers(tokens, saved_T, done_T)
        if tokens.num_decides:
            self._follow(tokens, counts)

    def _count_tiers(self, tokens: Tokens, saved_T: Array | None, done_T: Array | None) -> None:
        size, counts = len(self._tier_totals), tokens.tier_counts
        self._tier_totals[: len(counts), 0] += counts
        if saved_T is not None and done_T is not None:
            self._tier_totals[:, 1] += np.bincount(tokens.tier_T, weights=done_T, minlength=size)
            self._tier_totals[:, 2] += np.bincount(tokens.tier_T, weights=saved_T, minlength=size)

    def _follow(self, tokens: Tokens, counts: list[Any] | None) -> None:
        """Let each arm learn from its own tokens."""
        for arm in self.arms:
            mine_T = tokens.decides_T
            if self.rollout:
                mine_T = mine_T & (tokens.role_T & CANARY_ARM == arm.role)
            arm.follow(self.risk_CT, tokens.scale_T, mine_T, counts[arm.number] if counts else None)

    def begin_draft(self, level: int, num_tokens: int) -> Callable[[], None]:
        """Let the next passes run the MLPs of their first rows at a level, without decisions; call what it returns when they are over."""
        buffers = self.buffers
        roles_T = buffers.role_T[:num_tokens].clone()
        buffers.role_T[:num_tokens], buffers.level_T[:num_tokens] = 0, level
        buffers.active.fill_(1)
        self.is_active = True
        if self.device_forms is not None:
            self.device_forms.begin(num_tokens, is_active=True)

        def end() -> None:
            buffers.role_T[:num_tokens] = roles_T
            buffers.level_T[:num_tokens], buffers.saved_T[:num_tokens] = 0, 0
            buffers.active.zero_()
            self.is_active = False
            if self.device_forms is not None:
                self.device_forms.begin(0, is_active=False)

        return end

    def is_watching(self, layer: int) -> bool:
        """Whether the checkpoint after `layer` has anything to do in this step; on a GPU also in passes that warm up or are captured."""
        return self.recorder is not None or self.is_active or (self.device_forms is not None and self._num_tokens == 0)

    def observe(self, layer: int, hidden_TD: Tensor, residual_TD: Tensor | None = None) -> None:
        """Run the checkpoint after `layer` on the residual stream (T, D), given whole or in two parts, and set the levels of the confident."""
        if self.recorder is None and self.native and self.is_active:
            torch.ops.sedac.checkpoint_parts(hidden_TD, residual_TD, self.level_T, self.index_of_layer[layer])
            return
        if self.device_forms is not None:
            self.device_forms.observe(self.index_of_layer[layer], hidden_TD, residual_TD)
            if self.recorder is None:
                return
        stream_TD = hidden_TD.float() if residual_TD is None else hidden_TD.float() + residual_TD.float()
        if self.recorder is not None and self._num_tokens:
            self.recorder.add_stream(layer, stream_TD[: self._num_tokens])
        if self.device_forms is None and self.is_active:
            for arm in self.arms:
                plain.observe(self.buffers, self.table, arm, self.index_of_layer[layer], stream_TD[: self._num_tokens])

    def get_stats(self) -> Stats:
        """Return the totals since the worker started, of both arms; thresholds, exit rates and adaptations are the stable arm's."""
        self.settle()
        totals, num_layers = self._totals, self.layout.num_layers
        counts = (self.stable.counts_C2 + self.canary.counts_C2).tolist()
        thresholds, rates = self.stable.knobs_CK[:, 0].tolist(), self.stable.exit_rates
        return Stats(
            active_revision=self.revision,
            active_rollout=self.rollout,
            num_steps=totals["num_steps"],
            num_torn_steps=totals["num_torn_steps"],
            num_tokens=totals["num_tokens"],
            num_decode_tokens=totals["num_decode_tokens"],
            num_mlp_blocks_skipped=self._num_saved,
            num_mlp_blocks_computed=totals["num_tokens"] * num_layers - self._num_saved,
            checkpoints=tuple(
                CheckpointStats(layer=layer, num_evaluated=counts[i][0], num_exited=counts[i][1], threshold=thresholds[i], exit_rate=rates[i])
                for layer, i in self.index_of_layer.items()
            ),
            tiers=tuple(
                TierStats(name=name, num_tokens=int(tokens), num_exited=int(exited), num_mlp_blocks_computed=float(tokens * num_layers - saved))
                for name, (tokens, exited, saved) in zip(self._tier_rows, self._tier_totals.tolist(), strict=True)
            ),
            num_adaptations=self.stable.adapter.num_updates,
        )
