"""The engine's metrics: differences of totals, closed label sets, adapted thresholds."""

from __future__ import annotations

import math
from dataclasses import replace

from prometheus_client import REGISTRY, Counter
from sedac.agent.evidence import open_book
from sedac.agent.metrics import EngineMetrics
from sedac.agent.scoring import Loss
from sedac.contract.stats import CheckpointStats, Stats, TierStats
from sedac.policy.model import Adaptation, Audit, Checkpoint, Policy, Tier

from testing.figures import get_metric
from testing.workers import LAYOUT

CHECKPOINTS = (Checkpoint(layer=2, threshold=0.5), Checkpoint(layer=5, threshold=0.25))
ADAPTING = Policy(enabled=True, checkpoints=CHECKPOINTS, adaptation=Adaptation(enabled=True, target_exit_rates=(0.2, 0.4)))


def _make_stats(*, revision: int = 1, threshold: float = 0.0, adaptations: int = 0, tiers: dict[str, float] | None = None) -> Stats:
    return Stats(
        active_revision=revision,
        num_adaptations=adaptations,
        checkpoints=(CheckpointStats(layer=2, num_evaluated=10, num_exited=3, threshold=threshold, exit_rate=0.3),),
        tiers=tuple(
            TierStats(name=name, num_tokens=int(blocks), num_exited=int(blocks) // 2, num_mlp_blocks_computed=blocks)
            for name, blocks in (tiers or {}).items()
        ),
    )


def test_thresholds_in_force_are_the_adapted_ones_of_the_policy_in_force():
    metrics = EngineMetrics(model_name="adapted", layout=LAYOUT)
    metrics.set_policy(ADAPTING, 4, LAYOUT)
    assert get_metric("sedac_threshold", "adapted", checkpoint="2") == 0.5
    assert get_metric("sedac_target_exit_rate", "adapted", checkpoint="5") == 0.4
    assert math.isnan(get_metric("sedac_target_exit_rate", "adapted", checkpoint="8"))
    metrics.add(_make_stats(revision=3, threshold=9.0))
    assert get_metric("sedac_threshold", "adapted", checkpoint="2") == 0.5, "a reading of before the policy says nothing about it"
    metrics.add(_make_stats(revision=4, threshold=0.375))
    assert get_metric("sedac_threshold", "adapted", checkpoint="2") == 0.375
    assert get_metric("sedac_exit_rate", "adapted", checkpoint="2") == 0.3
    metrics.set_policy(replace(ADAPTING, adaptation=replace(ADAPTING.adaptation, frozen=True)), 5, LAYOUT)
    assert get_metric("sedac_threshold", "adapted", checkpoint="2") == 0.375, "no spike while the first reading is on its way"
    assert math.isnan(get_metric("sedac_target_exit_rate", "adapted", checkpoint="2")), "nothing steers to it while frozen"
    metrics.add(_make_stats(revision=5, threshold=0.375))
    assert get_metric("sedac_threshold", "adapted", checkpoint="2") == 0.375
    metrics.set_policy(replace(ADAPTING, adaptation=Adaptation()), 6, LAYOUT)
    metrics.add(_make_stats(revision=6, threshold=9.0))
    assert get_metric("sedac_threshold", "adapted", checkpoint="2") == 0.5


def test_adaptations_are_counted_over_resets():
    metrics = EngineMetrics(model_name="resets", layout=LAYOUT)
    for total in (3, 5, 5, 2, 4):
        metrics.add(_make_stats(adaptations=total))
    assert get_metric("sedac_adaptations_total", "resets") == 5 + 4


def test_tiers_are_counted_by_name():
    metrics = EngineMetrics(model_name="tiers", layout=LAYOUT)
    assert get_metric("sedac_tier_tokens_total", "tiers", tier="exact") == 0
    assert get_metric("sedac_layers", "tiers") == 12
    metrics.set_policy(Policy(tiers=(Tier(name="mine"),), default_tier="mine"), 1, LAYOUT)
    assert get_metric("sedac_tier_exited_tokens_total", "tiers", tier="mine") == 0
    metrics.add(_make_stats(tiers={"mine": 10.5}))
    metrics.add(_make_stats(tiers={"mine": 12.75, "exact": 4.0}))
    assert get_metric("sedac_tier_tokens_total", "tiers", tier="mine") == 12
    assert get_metric("sedac_tier_exited_tokens_total", "tiers", tier="mine") == 6
    assert get_metric("sedac_tier_mlp_blocks_computed_total", "tiers", tier="mine") == 12.75
    assert get_metric("sedac_tier_mlp_blocks_computed_total", "tiers", tier="exact") == 4


def test_the_set_of_tier_labels_is_closed():
    metrics = EngineMetrics(model_name="many", layout=LAYOUT)
    for start in (0, 20, 40):
        metrics.set_policy(Policy(tiers=tuple(Tier(name=f"t{i}") for i in range(start, start + 20)), default_tier=f"t{start}"), 1, LAYOUT)
    metrics.add(_make_stats(tiers={f"t{i}": 2.0 for i in range(60)}))
    labels = {
        s.labels["tier"] for m in REGISTRY.collect() for s in m.samples if s.name == "sedac_tier_tokens_total" and s.labels["model_name"] == "many"
    }
    assert len(labels) == 33, "32 tiers, and the rest"
    assert get_metric("sedac_tier_tokens_total", "many", tier="_other") == 2 * (60 - 31)
    assert get_metric("sedac_tier_tokens_total", "many", tier="t0") == 2


def test_speculation_is_told_from_vllms_counters():
    names = ("spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens", "generation_tokens")
    counters = [Counter(f"vllm:{name}", "As vLLM's own.", ["model_name", "engine"]) for name in names]
    try:
        metrics = EngineMetrics(model_name="drafting", layout=LAYOUT, is_speculating=True)
        EngineMetrics(model_name="alone", layout=LAYOUT)
        assert math.isnan(get_metric("sedac_draft_acceptance_rate", "drafting"))
        for counter, values in zip(counters, ((40, 60), (10, 15), (30, 20)), strict=True):
            for engine, value in enumerate(values):
                counter.labels("drafting", str(engine)).inc(value)
            counter.labels("another", "0").inc(1000)
        metrics.read_speculation()
        assert get_metric("sedac_draft_acceptance_rate", "drafting") == 0.25
        assert get_metric("sedac_draft_token_ratio", "drafting") == 0.5
        assert get_metric("sedac_draft_acceptance_rate", "alone") is None
    finally:
        for counter in counters:
            REGISTRY.unregister(counter)


AUDITED = Policy(enabled=True, tiers=(Tier(name="mine"),), default_tier="mine", audit=Audit(share=1.0, confidence=0.9))


def _get_mismatch(model: str, limit: str, side: str = "stable") -> float:
    return get_metric("sedac_audit_mismatch", model, tier="mine", side=side, limit=limit)


def test_what_audits_found_is_shown_per_tier_and_side_and_nothing_is_no_zero():
    metrics = EngineMetrics(model_name="audited", layout=LAYOUT).evidence
    stable, candidate = open_book(None, AUDITED, revision=3), open_book(None, AUDITED, rollout=2)
    metrics.set_books([stable, candidate])
    assert get_metric("sedac_rollout", "audited") == 2
    for side in ("stable", "candidate"):
        assert get_metric("sedac_audited_answers_total", "audited", tier="mine", side=side) == 0, "there before anything is counted"
        assert all(math.isnan(_get_mismatch("audited", limit, side)) for limit in ("lower", "mean", "upper"))
    page = stable.get_page("mine")
    for num_mismatches in (0, 10) * 50:
        loss = Loss(num_tokens=100, num_mismatches=num_mismatches, nll_difference=0.25)
        page.add_loss(loss)
        metrics.add_result(page, loss)
    metrics.add_result(page, "dropped")
    metrics.add_latency(candidate.get_page("mine"), 0.5, None)
    metrics.show()
    lower, mean, upper = (_get_mismatch("audited", limit) for limit in ("lower", "mean", "upper"))
    assert 0.001 < lower < mean < upper < 0.3
    assert mean == 0.05
    assert get_metric("sedac_audit_nll_difference", "audited", tier="mine", side="stable", limit="mean") == 0.25
    assert get_metric("sedac_audited_answers_total", "audited", tier="mine", side="stable") == 100
    assert get_metric("sedac_audit_failures_total", "audited", reason="dropped") == 1
    assert get_metric("sedac_audit_failures_total", "audited", reason="failed") == 0
    assert math.isnan(_get_mismatch("audited", "mean", "candidate"))
    assert get_metric("sedac_request_first_token_seconds_sum", "audited", side="candidate") == 0.5
    assert get_metric("sedac_request_token_seconds_count", "audited", side="candidate") == 0
    metrics.set_books([open_book(stable, AUDITED, revision=4)])
    assert math.isnan(_get_mismatch("audited", "mean")), "what was found under another policy says nothing of this one"
    assert get_metric("sedac_audited_answers_total", "audited", tier="mine", side="stable") == 100
    assert get_metric("sedac_rollout", "audited") == 0


def test_a_sampled_answer_shows_its_nll_difference_alone():
    metrics = EngineMetrics(model_name="sampled", layout=LAYOUT).evidence
    book = open_book(None, AUDITED, revision=3)
    book.get_page("mine").add_loss(Loss(num_tokens=10, num_mismatches=None, nll_difference=0.1))
    metrics.set_books([book])
    assert math.isnan(_get_mismatch("sampled", "mean"))
    assert math.isnan(_get_mismatch("sampled", "lower"))
    assert get_metric("sedac_audit_nll_difference", "sampled", tier="mine", side="stable", limit="mean") == 0.1


def test_tiers_beyond_the_labels_are_counted_together():
    metrics = EngineMetrics(model_name="many-audits", layout=LAYOUT).evidence
    for revision in range(1, 4):
        tiers = tuple(Tier(name=f"t{revision}-{i}") for i in range(20))
        book = open_book(None, Policy(tiers=tiers, default_tier="exact"), revision=revision)
        metrics.set_books([book])
    page = book.get_page("t3-1")
    loss = Loss(num_tokens=1, num_mismatches=0, nll_difference=0.0)
    page.add_loss(loss)
    metrics.add_result(page, loss)
    metrics.show()
    assert get_metric("sedac_audited_answers_total", "many-audits", tier="_other", side="stable") == 1
    assert get_metric("sedac_audit_mismatch", "many-audits", tier="t3-1", side="stable", limit="mean") is None
