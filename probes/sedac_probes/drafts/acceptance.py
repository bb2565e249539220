"""Held-out acceptance of a draft by true rollouts, and what it is worth by the cost model.

A draft token is computed from the model's own streams of the tokens before it, which are exact, so on a text that the model wrote
greedily a draft says at every place what it would say while serving. Rollouts over those texts are therefore the engine's own, but for
rounding: draft up to the limits, accept up to the first miss, take the model's token, go on behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from sedac.probe.draft import DraftHead
from torch import Tensor

from sedac_probes.drafts.fit import run_head
from sedac_probes.drafts.states import States, get_rows
from sedac_probes.drafts.trial import Trial

CONFIDENCES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
MOST_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Guesses:
    """What a draft says at the places of one text from which it would draft."""

    agrees: list[bool]
    """Whether the draft's token is the model's own choice."""
    confidence: list[float]
    """The probability that the draft gives its token, as in serving."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Counts of steps of single sequences; `num_tokens` are output tokens but each text's first, which its prompt gives."""

    num_tokens: int
    lengths: tuple[int, ...]
    """Steps by number of draft tokens: 0, 1, 2, ..."""
    accepted_at: tuple[int, ...]
    """Draft tokens accepted, by position."""
    reached_at: tuple[int, ...]
    """Draft tokens by position, where those before them were accepted."""

    @property
    def num_steps(self) -> int:
        """Steps."""
        return sum(self.lengths)

    @property
    def num_passes(self) -> int:
        """Draft passes."""
        return sum(i * n for i, n in enumerate(self.lengths))

    @property
    def tokens_per_step(self) -> float:
        """Output tokens of a step."""
        return self.num_tokens / self.num_steps

    @property
    def acceptance(self) -> tuple[float, ...]:
        """By position: share of the draft tokens there that are accepted when those before were."""
        return tuple(a / r if r else 0.0 for a, r in zip(self.accepted_at, self.reached_at, strict=True))


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """Seconds of the engine at batch 1, with one draft."""

    plain: float
    """Seconds of a step without drafts (T1)."""
    verify: float
    """Seconds of a step that verifies drafts, less what each of them adds."""
    row: float
    """Seconds that each verified draft token adds."""
    draft_pass: float

    @classmethod
    def from_trial(cls, trial: Trial) -> StepCosts:
        """Take them from a trial in the engine."""
        return cls(plain=trial.plain, verify=trial.verify, row=trial.row, draft_pass=trial.draft_pass)

    def predict(self, rollout: Rollout) -> float:
        """Return the speed-up over plain steps: tau T1 / (k d + V(k + 1)), summed over the lengths k that occurred."""
        plain, drafting = rollout.lengths[0], sum(rollout.lengths[1:])
        seconds = rollout.num_passes * (self.draft_pass + self.row) + drafting * self.verify + plain * self.plain
        return rollout.num_tokens * self.plain / seconds


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """Limits of drafting, and the speed-up that the cost model predicts of them at batch 1."""

    max_tokens: int
    min_confidence: float
    speedup: float
    tokens_per_step: float


@torch.no_grad()
def guess(head: DraftHead, heldout: States, lm_head_VD: Tensor, batch_size: int = 16) -> list[Guesses]:
    """Return the guesses on every piece that the model went on with; those must be greedy."""
    made = []
    for first in range(0, heldout.num_pieces, batch_size):
        pieces = list(range(first, min(first + batch_size, heldout.num_pieces)))
        hidden_ND = run_head(head, heldout, pieces, torch.float32)
        rows_N = get_rows(heldout, pieces)
        is_own_N, next_N = heldout.is_own_N[rows_N], heldout.next_N[rows_N]
        logits_NV = hidden_ND[is_own_N] @ lm_head_VD.T
        best = logits_NV.max(-1)
        agrees = best.indices == next_N[is_own_N]
        confidence = (best.values - logits_NV.logsumexp(-1)).exp()
        sizes = [int(heldout.is_own_N[heldout.starts[i] : heldout.starts[i + 1]].sum()) for i in pieces]
        for a, c in zip(agrees.split(sizes), confidence.split(sizes), strict=True):
            made.append(Guesses(agrees=a[1:].tolist(), confidence=c[1:].tolist()))  # the prompt itself gives the first token
    return [guesses for guesses in made if guesses.agrees]


def roll_out(texts: Iterable[Guesses], max_tokens: int, min_confidence: float = 0.0) -> Rollout:
    """Count what the engine would: up to `max_tokens` draft tokens, none after their joint confidence fell below `min_confidence`."""
    lengths = [0] * (max_tokens + 1)
    accepted_at, reached_at = [0] * max_tokens, [0] * max_tokens
    num_tokens = 0
    for text in texts:
        at, end = 0, len(text.agrees)
        num_tokens += end
        while at < end:
            room = min(max_tokens, end - at - 1)
            joint, length, accepted, is_right = 1.0, 0, 0, True
            while length < room and (length == 0 or joint >= min_confidence):
                reached_at[length] += is_right
                is_right = is_right and text.agrees[at + length]
                accepted_at[length] += is_right
                accepted += is_right
                joint *= text.confidence[at + length]
                length += 1
            lengths[length] += 1
            at += accepted + 1
    return Rollout(num_tokens=num_tokens, lengths=tuple(lengths), accepted_at=tuple(accepted_at), reached_at=tuple(reached_at))


def propose(texts: Sequence[Guesses], costs: StepCosts) -> Proposal:
    """Return the limits that the cost model likes best."""
    found = []
    for max_tokens in range(1, MOST_TOKENS + 1):
        for min_confidence in CONFIDENCES:
            rollout = roll_out(texts, max_tokens, min_confidence)
            speedup = costs.predict(rollout)
            found.append(Proposal(max_tokens=max_tokens, min_confidence=min_confidence, speedup=speedup, tokens_per_step=rollout.tokens_per_step))
    return max(found, key=lambda proposal: (proposal.speedup, -proposal.max_tokens))
