"""The search for what a reduced draft leaves out: each part's own effect, then one part after the other, then swaps.

Called by `make_reduced_draft`. The objective is the speed-up that the cost model predicts from a draft's acceptance and the cost of its pass,
at the best number of drafts and the best stopping confidence. It can fall before it rises (one part left out saves little), so parts go by the
acceptance they cost per second they save, to the end, and the best of all drafts seen on the way is refined. Deterministic: ties go to the part
named first, and nothing is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from sedac.policy.model import FULL

from sedac_probes.drafts.acceptance import CONFIDENCES, Proposal, Rollout, StepCosts
from sedac_probes.drafts.costs import PartCosts
from sedac_probes.drafts.left_out import LeftOut, Part
from sedac_probes.drafts.windows import Agreement

_WIDTH = 4
"""Number of parts whose effect is measured anew before the next one is left out. The others keep the effect that was last measured."""
_MIN_ACCEPTANCE = 0.25
"""Acceptance of the first draft below which leaving out more is given up."""
_MIN_GAIN = 1e-3
"""Least relative speed-up for which a swap is made."""
_NUM_SWAPPED = 5
"""Number of parts that are best to leave out, and of those best to take back. Each is tried with each."""

Move = Part | str
"""Leaves a part out, or runs the MLPs at this level."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One draft's acceptance."""

    left_out: LeftOut
    rollouts: Mapping[tuple[int, float], Rollout]
    """The steps from every start, by limit of draft tokens per step and stopping confidence, see `Agreement.sum_up`."""

    @classmethod
    def from_agreement(cls, left_out: LeftOut, agreement: Agreement) -> Judged:
        """Sum up an agreement."""
        lengths = range(1, agreement.agrees_NIK.shape[2] + 1)
        rollouts = {(length, confidence): agreement.sum_up(length, confidence) for length, confidence in product(lengths, CONFIDENCES)}
        return cls(left_out=left_out, rollouts=rollouts)

    @property
    def longest(self) -> Rollout:
        """The steps in which all drafts are made."""
        return self.rollouts[max(length for length, _ in self.rollouts), 0.0]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; `from_dict` is the inverse."""
        return {"left_out": self.left_out.to_dict(), "rollouts": [[*limits, asdict(rollout)] for limits, rollout in self.rollouts.items()]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Judged:
        """Build from `to_dict`'s form."""
        rollouts = {}
        for length, confidence, fields in data["rollouts"]:
            parts = {name: tuple(fields[name]) for name in ("lengths", "accepted_at", "reached_at")}
            rollouts[int(length), float(confidence)] = Rollout(num_tokens=fields["num_tokens"], **parts)
        return cls(left_out=LeftOut.from_dict(data["left_out"]), rollouts=rollouts)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A draft at its best limits."""

    judged: Judged
    costs: StepCosts
    proposal: Proposal

    @property
    def speedup(self) -> float:
        """Predicted."""
        return self.proposal.speedup

    @property
    def left_out(self) -> LeftOut:
        """What the draft leaves out."""
        return self.judged.left_out


def choose_limits(judged: Judged, costs: StepCosts) -> Choice:
    """Return the draft with the number of drafts and the stopping confidence that the cost model finds best."""
    found = [
        Proposal(max_tokens=length, min_confidence=confidence, speedup=costs.predict(rollout), tokens_per_step=rollout.tokens_per_step)
        for (length, confidence), rollout in judged.rollouts.items()
    ]
    return Choice(judged=judged, costs=costs, proposal=max(found, key=lambda p: (p.speedup, -p.max_tokens, -p.min_confidence)))


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the search saw."""

    alone: list[Choice]
    """Each part, and each level, on its own."""
    path: list[Choice]
    """One part after the other, from nothing left out on."""
    best: Choice
    tried: list[Choice]
    """All drafts, in the order of their measurement."""


class Search:
    """One search; `measure` is asked for each draft once."""

    def __init__(self, measure: Callable[[LeftOut], Judged], costs: PartCosts, num_layers: int, levels: Sequence[str], max_trials: int) -> None:
        """`levels` are those to try beside `full`."""
        self._measure, self._costs, self._num_layers, self._levels, self._max_trials = measure, costs, num_layers, tuple(levels), max_trials
        self._parts: list[Part] = [(kind, layer) for layer in range(num_layers) for kind in ("attention", "mlp")]
        self._seen: dict[LeftOut, Choice] = {}

    def run(self) -> Found:
        """Search until nothing gets better, or `max_trials` drafts were measured."""
        whole = self._try(LeftOut())
        moves: list[Move] = [*self._parts, *self._levels]
        alone = [self._try(_apply(LeftOut(), move)) for move in moves]
        path = self._descend(whole, {move: self._price(whole, choice) for move, choice in zip(moves, alone, strict=True)})
        best = max(self._seen.values(), key=lambda choice: choice.speedup)
        return Found(alone=alone, path=path, best=self._refine(best), tried=list(self._seen.values()))

    @property
    def _is_spent(self) -> bool:
        return len(self._seen) >= self._max_trials

    def _try(self, left_out: LeftOut) -> Choice:
        if left_out not in self._seen:
            self._seen[left_out] = choose_limits(self._measure(left_out), self._costs.get(left_out, self._num_layers))
        return self._seen[left_out]

    def _price(self, before: Choice, after: Choice) -> float:
        """Return what is accepted less per second saved; infinite where nothing is saved."""
        saved = before.costs.draft_pass - after.costs.draft_pass
        return (before.judged.longest.tokens_per_step - after.judged.longest.tokens_per_step) / saved if saved > 0 else float("inf")

    def _descend(self, whole: Choice, prices: dict[Move, float]) -> list[Choice]:
        path = [whole]
        while prices and not self._is_spent and path[-1].judged.longest.acceptance[0] >= _MIN_ACCEPTANCE:
            now = path[-1]
            nearest = sorted(prices, key=lambda move: (prices[move], str(move)))[:_WIDTH]
            tries = {move: self._try(_apply(now.left_out, move)) for move in nearest}
            prices |= {move: self._price(now, choice) for move, choice in tries.items()}
            move = min(nearest, key=lambda move: (prices[move], str(move)))
            if prices[move] == float("inf"):
                prices.pop(move)
                continue
            path.append(tries[move])
            prices = {other: price for other, price in prices.items() if other != move}
        return path

    def _refine(self, best: Choice) -> Choice:
        while not self._is_spent:
            left_out = best.left_out
            near = {part: self._try(left_out.toggle(part)) for part in self._parts if not self._is_spent}
            others = [self._try(replace(left_out, level=level)) for level in (FULL, *self._levels) if not self._is_spent]
            ranked = sorted(near, key=lambda part: (-near[part].speedup, part))
            outer = [part for part in ranked if not left_out.has(part)][:_NUM_SWAPPED]
            inner = [part for part in ranked if left_out.has(part)][:_NUM_SWAPPED]
            swapped = [self._try(left_out.toggle(a).toggle(b)) for a, b in product(outer, inner) if not self._is_spent]
            found = max([best, *near.values(), *others, *swapped], key=lambda choice: choice.speedup)
            if found.speedup < best.speedup * (1 + _MIN_GAIN):
                return best
            best = found
        return max(self._seen.values(), key=lambda choice: choice.speedup)


def _apply(left_out: LeftOut, move: Move) -> LeftOut:
    return replace(left_out, level=move) if isinstance(move, str) else left_out.toggle(move)
