"""Figures as engines count them: of self-speculation, and as the agent shows them in its metrics."""

from __future__ import annotations

from prometheus_client import REGISTRY
from sedac.contract.stats import ControllerStats, DraftingStats
from sedac.engine.drafting.totals import Totals


def make_controller(num_sequences: int, state: str = "drafting", gain: float = 1.25) -> ControllerStats:
    """Return what the controller knows of steps with so many sequences."""
    return ControllerStats(
        num_sequences=num_sequences, state=state, gain=gain, plain_seconds=0.02, step_seconds=0.025, draft_pass_seconds=0.0, tokens_per_step=2.5
    )


def make_drafting(*generated: tuple[int, int], max_tokens: int = 3, controller: tuple[ControllerStats, ...] = ()) -> DraftingStats:
    """Sequences in steps of a quarter of a second each: (draft tokens verified, accepted)."""
    totals = Totals(max_tokens)
    totals.count_verified(generated)
    for drafted, _ in generated:
        totals.count_step(0.25)
        totals.count_drafting(drafted, drafted * 0.03125)
    return totals.get_stats("adapter", controller)


def get_metric(name: str, model: str, **labels: str) -> float | None:
    """Return a sample of the agent's metrics, of engine 0 of a model; None: there is none."""
    return REGISTRY.get_sample_value(name, {"model_name": model, "engine": "0", **labels})
