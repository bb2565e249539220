"""Self-speculation on /metrics: differences of totals, a true histogram of lengths, the controller's state; absent without a draft."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY, CollectorRegistry, Histogram, generate_latest
from sedac.agent.drafting_metrics import LengthHistogram
from sedac.agent.metrics import EngineMetrics
from sedac.contract.stats import CONTROLLER_STATES, DraftingStats, Stats

from testing.figures import get_metric, make_controller, make_drafting
from testing.workers import LAYOUT


def _get(name: str, model: str, **labels: str) -> float | None:
    return get_metric(f"sedac_{name}", model, kind="adapter", **labels)


def _add(metrics: EngineMetrics, drafting: DraftingStats | None) -> None:
    metrics.add(Stats(drafting=drafting))


def test_totals_become_counters_and_a_restart_does_not_take_them_back():
    metrics = EngineMetrics(model_name="drafts", layout=replace(LAYOUT, draft="adapter", max_draft_tokens=3), is_speculating=True)
    assert _get("draft_tokens_total", "drafts") == 0, "there before anything is counted"
    assert _get("draft_accepted_at_total", "drafts", position="2") == 0
    assert _get("draft_length_count", "drafts") == 0
    _add(metrics, make_drafting((3, 2), (0, 0)))
    _add(metrics, make_drafting((3, 2), (0, 0), (2, 2)))
    _add(metrics, make_drafting((3, 2), (0, 0), (2, 2)))
    for restarted in (False, True):
        if restarted:
            _add(metrics, make_drafting((1, 0)))
        more = int(restarted)
        assert _get("draft_tokens_total", "drafts") == 5 + more
        assert _get("draft_accepted_tokens_total", "drafts") == 4
        assert _get("draft_passes_total", "drafts") == 5 + more
        assert _get("draft_seconds_total", "drafts") == (5 + more) * 0.03125
        assert _get("step_seconds_total", "drafts") == (3 + more) * 0.25
        assert [_get("draft_tokens_at_total", "drafts", position=str(i)) for i in range(4)] == [2 + more, 2, 1, None]
        assert [_get("draft_accepted_at_total", "drafts", position=str(i)) for i in range(4)] == [2, 2, 0, None]
        assert [_get("draft_length_bucket", "drafts", le=f"{i}.0") for i in range(4)] == [1, 1 + more, 2 + more, 3 + more]
        assert (_get("draft_length_count", "drafts"), _get("draft_length_sum", "drafts")) == (3 + more, 5 + more)


def test_an_engine_without_a_draft_shows_none_of_it():
    _add(EngineMetrics(model_name="no-draft", layout=LAYOUT), None)
    shown = {s.name for m in REGISTRY.collect() for s in m.samples if s.labels.get("model_name") == "no-draft"}
    assert "sedac_steps_total" in shown
    assert not [name for name in shown if name.startswith(("sedac_draft", "sedac_step_seconds"))]


def test_the_controller_is_in_one_state_and_what_is_unknown_is_no_zero():
    metrics = EngineMetrics(model_name="controlled", layout=LAYOUT)
    new = replace(make_controller(16, "measuring", 0.0), tokens_per_step=0.0)
    _add(metrics, make_drafting((1, 1), controller=(make_controller(1), new)))
    assert _get("draft_controller_gain", "controlled", sequences="1") == 1.25
    assert _get("draft_controller_seconds", "controlled", sequences="1", part="plain") == 0.02
    assert _get("draft_controller_seconds", "controlled", sequences="1", part="verify") == 0.025
    assert _get("draft_controller_tokens_per_step", "controlled", sequences="1") == 2.5
    for name, labels in (("gain", {}), ("tokens_per_step", {}), ("seconds", {"part": "draft"})):
        assert math.isnan(_get(f"draft_controller_{name}", "controlled", sequences="16", **labels)), name
    for state in ("paused", "drafting"):
        _add(metrics, make_drafting((1, 1), controller=(make_controller(1, state, 0.9),)))
        states = {each: _get("draft_controller_state", "controlled", sequences="1", state=each) for each in CONTROLLER_STATES}
        assert states == {each: float(each == state) for each in CONTROLLER_STATES}


@given(st.lists(st.integers(0, 50), max_size=12))
def test_many_at_once_are_as_one_by_one(counts):
    shown = []
    for kind in (LengthHistogram, Histogram):
        registry = CollectorRegistry()
        histogram = kind("lengths", "of the test", ["kind"], registry=registry, buckets=range(8)).labels("adapter")
        if isinstance(histogram, LengthHistogram):
            histogram.add(counts)
        else:
            for length, count in enumerate(counts):
                for _ in range(count):
                    histogram.observe(length)
        shown.append([line for line in generate_latest(registry).decode().splitlines() if "_created" not in line])
    assert shown[0] == shown[1]
