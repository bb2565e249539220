"""What SEDAC keeps in a worker: the sides in force, the probe sets, the running step, and counters; how to compute is its backend's.

One `State` per model; the worker drives `apply`, `begin_step`, `end_step` and `get_stats`, the checkpoints `observe`. All of it runs
on the thread that runs the model, so neither a policy nor a probe changes within a step. Buffers keep their addresses for the life of the
engine and are written in place; backends read the same ones.
T tokens of the step, C checkpoints, D hidden size, S sides; a 2 is (evaluated, exited), a K one of a checkpoint's three knobs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sedac.contract.stats import CheckpointStats, Stats
from sedac.engine.backends.base import Backend, Left
from sedac.engine.backends.levels import LevelTable
from sedac.engine.backends.tokens import OF_CANDIDATE, Array, TokenBuffers, Tokens
from sedac.engine.step.counters import Counters
from sedac.engine.step.probe_sets import Loaded, ProbeSets
from sedac.engine.step.record import Recorder
from sedac.engine.step.sides import SIDES, Side
from sedac.errors import FieldViolation, PolicyInvalid
from sedac.policy.check import validate
from sedac.policy.layout import Layout, ProbeSetSummary
from sedac.policy.model import Candidate, Policy
from sedac.probe.probe import LREProbe

_MAX_REPEATS = 256
"""Passes that are counted together at most: sums of their savings stay exact enough in fp32."""


def _count_nothing(saved_T: Array, num_steps: int) -> None:
    """Stand in until the worker's requests are there."""


class State:
    """The worker's SEDAC state; see the module's docstring."""

    def __init__(
        self,
        layout: Layout,
        probes: dict[int, LREProbe],
        table: LevelTable,
        *,
        max_num_tokens: int,
        device: torch.device,
        make_backend: Callable[..., Backend],
    ) -> None:
        """`probes` are those attached from the start; none may have a rank over the layout's `max_rank`. `make_backend`: see backends/choice.py.

        Raises:
            UnsupportedModel: the backend lacks a kind of level that the table has.
        """
        self.layout, self.table = layout, table
        self.probe_sets = ProbeSets(layout=layout, attached=Loaded(sha256=layout.probe_set_sha256, probes=probes))
        self.recorder: Recorder | None = None
        self.revision = 0
        self.rollout = 0
        """Number of the roll-out whose candidate is in force beside the policy. 0 means none."""
        self.version = 0
        """Number of times that something came into force."""
        self.index_of_layer = {layer: i for i, layer in enumerate(layout.checkpoint_layers)}
        num_checkpoints = max(1, len(layout.checkpoint_layers))
        self.buffers = TokenBuffers(num_checkpoints, max_num_tokens, device)
        self.level_T, self.saved_T = self.buffers.level_T, self.buffers.saved_T
        knobs_SCK = torch.zeros(len(SIDES), num_checkpoints, 3, dtype=torch.float32, device=device)
        counts_SC2 = torch.zeros(len(SIDES), num_checkpoints, 2, dtype=torch.int64, device=device)
        self.stable, self.candidate = (Side(i, layout, knobs_SCK[i], counts_SC2[i], device) for i in range(len(SIDES)))
        self.stable.configure(Policy(), self.probe_sets.attached)
        self._tokens: Tokens | None = None
        self.last_tokens: Tokens | None = None
        """Tokens of the last step in which anything was decided or observed."""
        self.observed_tokens: Tokens | None = None
        """Tokens of the last step whose results the host has read. Its risks are in `risk_CT` (C, T), NaN where not evaluated."""
        self.risk_CT: Array = np.zeros((num_checkpoints, 0), dtype=np.float32)
        self._step_version = 0
        self._num_repeats = 0
        """Number of passes by `begin_repeat` that are not counted yet."""
        self._is_repeatable = False
        """Whether nothing that is in force learns from each step on its own."""
        self.count_requests: Callable[[Array, int], None] = _count_nothing
        """Takes the MLPs saved per token (T,) of repeated passes, all together, and the number of passes."""
        self.counters = Counters()
        self.backend = make_backend(self.buffers, table, (self.stable, self.candidate), counts_SC2, self._count)

    @property
    def sides(self) -> tuple[Side, ...]:
        """Those in force."""
        return (self.stable, self.candidate) if self.rollout else (self.stable,)

    def get_side(self, rollout: int) -> Side:
        """Return the side of a request that was stamped with a roll-out's number, 0: with none."""
        return self.candidate if rollout and rollout == self.rollout else self.stable

    @property
    def is_enabled(self) -> bool:
        """Whether any policy in force may reduce anything."""
        return any(side.policy.enabled for side in self.sides)

    @property
    def is_active(self) -> bool:
        """Whether any token of the running step is or may get reduced."""
        return self.backend.is_active

    @property
    def num_tokens(self) -> int:
        """Tokens of the running step; 0 between steps, where warm-up and dummy passes run."""
        return self.backend.num_tokens

    def apply(self, policy: Policy, revision: int, candidate: Candidate | None = None) -> None:
        """Put a policy, a roll-out's candidate beside it, and their probe sets into force from the next step on.

        Whether a certificate fits is the agent's to check, which knows the weights.

        Raises:
            PolicyInvalid: all stays as it was; the candidate's fields begin with `candidate.policy.`.
        """
        self.settle()
        summaries = self.probe_sets.get_summaries()
        bad = self._find_violations(policy, summaries)
        if candidate is not None:
            bad += [FieldViolation(f"candidate.policy.{v.field}", v.description) for v in self._find_violations(candidate.policy, summaries)]
            if candidate.rollout <= 0:
                bad.append(FieldViolation("candidate.rollout", f"{candidate.rollout} is not over 0; give the roll-out's number"))
        if bad:
            raise PolicyInvalid(bad)
        wanted = {side: self.probe_sets.find(p.probe_set) for side, p in (("stable", policy), ("candidate", candidate and candidate.policy)) if p}
        if candidate is None and self.rollout and policy == self.candidate.policy:
            self.stable.swap_learned(self.candidate)  # promoted: the thresholds that it has adapted go on
        self.stable.configure(policy, wanted["stable"])
        if candidate is None:
            self.candidate.clear()
        else:
            self.candidate.configure(candidate.policy, wanted["candidate"], is_new=candidate.rollout != self.rollout)
        self._is_repeatable = not any(side.adapter.is_on or side.policy.sensitivity > 0 for side in (self.stable, self.candidate))
        self.revision, self.rollout, self.version = revision, candidate.rollout if candidate else 0, self.version + 1
        self.probe_sets.drop_unused({loaded.sha256 for loaded in wanted.values()})
        for side in self.sides:
            for tier in ("exact", *(t.name for t in side.policy.get_tiers())):
                self.get_tier_row(tier)
        self.backend.set_sides(self.sides)

    def _find_violations(self, policy: Policy, summaries: Mapping[str, ProbeSetSummary]) -> list[FieldViolation]:
        try:
            validate(replace(policy, certificate=None), self.layout, summaries)
        except PolicyInvalid as error:
            return list(error.violations)
        return []

    def get_tier_row(self, tier: str) -> int:
        """Return the row of a tier's counters, made when first asked for."""
        return self.counters.get_tier_row(tier)

    def begin_step(self, num_tokens: int, tokens: Tokens | None) -> None:
        """Start a forward pass over `num_tokens` tokens; None: all of them in full."""
        self.count_repeats()
        self._step_version, self._tokens = self.version, tokens
        active = None
        if tokens is not None:
            self.counters.num_decode_tokens += tokens.num_decides
            has_thresholds = any(side.has_thresholds for side in self.sides)
            if tokens.has_floor or (has_thresholds and (tokens.num_decides > 0 or bool(tokens.role_T.any()))):
                active = tokens
        self.backend.begin(num_tokens, active, is_new=active is not self.last_tokens)

    def begin_plain(self, num_tokens: int) -> None:
        """Start a forward pass over `num_tokens` tokens of exact requests alone."""
        self.count_repeats()
        self._step_version, self._tokens = self.version, None
        if self.is_enabled:
            self.counters.count_exact(num_tokens)
        self.backend.begin(num_tokens, None, is_new=False)

    def begin_repeat(self, tokens: Tokens) -> bool:
        """Start a pass over the very tokens of the last one, to be counted together with others; False: not possible, use `begin_step`."""
        if tokens is not self.last_tokens or not (self._is_repeatable and self.backend.can_repeat):
            return False
        self.backend.begin_repeat(tokens)
        return True

    def end_repeat(self) -> None:
        """Finish a pass that `begin_repeat` began."""
        self.backend.end_repeat()
        self._num_repeats += 1
        if self._num_repeats == _MAX_REPEATS:
            self.count_repeats()

    def count_repeats(self) -> None:
        """Count the passes by `begin_repeat` since the last time."""
        if not self._num_repeats:
            return
        num_steps, self._num_repeats = self._num_repeats, 0
        tokens, left = self.last_tokens, self.backend.take_repeats()
        assert tokens is not None
        self.counters.num_steps += num_steps
        self.counters.num_tokens += num_steps * len(tokens.role_T)
        self.counters.num_decode_tokens += num_steps * tokens.num_decides
        self._count(tokens, left, num_steps)
        self.count_requests(left.saved_T, num_steps)

    def end_step(self) -> Array | None:
        """Finish the pass: count it and clear what belongs to it alone; returns the MLPs saved per token (T,).

        None: none, or the pass may still run and is counted later (`settle`).
        """
        backend, counters, tokens = self.backend, self.counters, self._tokens
        counters.num_steps += 1
        counters.num_tokens += backend.num_tokens
        counters.num_torn_steps += self._step_version != self.version
        if backend.is_active:
            self.last_tokens = tokens
        self._tokens = None
        return backend.end(tokens)

    def settle(self) -> None:
        """Count what all passes have left."""
        self.count_repeats()
        self.backend.settle()

    def _count(self, tokens: Tokens | None, left: Left | None, num_steps: int = 1) -> None:
        """Count one pass, or so many over the same tokens, and let the sides learn from it; see `backends.base.Count`."""
        if tokens is None:
            return
        self.counters.count_tokens(tokens, left, num_steps)
        if left is not None:
            self.risk_CT, self.observed_tokens = left.risk_CT, tokens
            if tokens.num_decides:
                self._follow(tokens, left.counts_SC2, num_steps)

    def _follow(self, tokens: Tokens, counts: list[Any] | None, num_steps: int) -> None:
        """Let each side learn from its own tokens; `counts`: each side's totals after them, None: as they are."""
        for side in self.sides:
            mine_T = tokens.decides_T
            if self.rollout:
                mine_T = mine_T & (tokens.role_T & OF_CANDIDATE == side.role)
            side.follow(self.risk_CT, tokens.scale_T, mine_T, counts[side.number] if counts else None, num_steps=num_steps)

    def is_watching(self) -> bool:
        """Whether checkpoints have anything to do in this pass."""
        backend = self.backend
        return backend.is_active or self.recorder is not None or (backend.observes_idle and backend.num_tokens == 0)

    def observe(self, layer: int, hidden_TD: Tensor, residual_TD: Tensor | None = None) -> None:
        """Run the checkpoint after `layer` on the residual stream (T, D), given whole or in two parts, and set the levels of the confident."""
        num_tokens = self.backend.num_tokens
        if self.recorder is not None and num_tokens:
            stream_TD = hidden_TD.float() if residual_TD is None else hidden_TD.float() + residual_TD.float()
            self.recorder.add_stream(layer, stream_TD[:num_tokens])
        self.backend.observe(self.index_of_layer[layer], hidden_TD, residual_TD)

    def get_stats(self) -> Stats:
        """Return the totals since the worker started, of both sides; thresholds, exit rates and adaptations are the stable side's."""
        self.settle()
        totals, num_layers = self.counters, self.layout.num_layers
        counts = (self.stable.counts_C2 + self.candidate.counts_C2).tolist()
        thresholds, rates = self.stable.knobs_CK[:, 0].tolist(), self.stable.exit_rates
        return Stats(
            active_revision=self.revision,
            active_rollout=self.rollout,
            num_steps=totals.num_steps,
            num_torn_steps=totals.num_torn_steps,
            num_tokens=totals.num_tokens,
            num_decode_tokens=totals.num_decode_tokens,
            num_mlp_blocks_skipped=totals.num_saved,
            num_mlp_blocks_computed=totals.num_tokens * num_layers - totals.num_saved,
            checkpoints=tuple(
                CheckpointStats(layer=layer, num_evaluated=counts[i][0], num_exited=counts[i][1], threshold=thresholds[i], exit_rate=rates[i])
                for layer, i in self.index_of_layer.items()
            ),
            tiers=totals.get_tiers(num_layers),
            num_adaptations=self.stable.adapter.num_updates,
        )
