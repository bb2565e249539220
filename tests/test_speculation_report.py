"""What the speculation benchmark computes from steps: windows, curves and the cost model, on numbers whose results are known."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest


def _import_report() -> Any:
    spec = importlib.util.spec_from_file_location("speculation_report", Path(__file__).resolve().parents[1] / "benchmarks" / "speculation_report.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


report = _import_report()


def _run(seconds: list[float], tokens: list[int], **more: Any) -> dict[str, Any]:
    wave = {"seconds": seconds, "num_tokens": tokens, "num_turns": len(seconds), "answers": [[1, 2, 3]]}
    return {"waves": [wave], "drafts": {}, **more}


def test_the_lowest_window_finds_a_slow_stretch_of_500_tokens() -> None:
    plain = [(0.01, 1)] * 2000
    own = [(0.01, 2)] * 500 + [(0.04, 2)] * 250 + [(0.01, 2)] * 250
    assert report.find_lowest_window(own, plain) == pytest.approx(0.5, rel=1e-6)
    assert report.find_lowest_window(plain, plain) == pytest.approx(1)
    assert report.find_lowest_window([(0.01, 2)] * 1000, plain) == pytest.approx(2)


def test_too_few_tokens_have_no_window() -> None:
    assert report.find_lowest_window([(0.01, 1)] * 499, [(0.01, 1)] * 2000) is None


def test_a_curve_is_read_between_and_beyond_its_points() -> None:
    curve = {1: 10.0, 4: 16.0, 8: 32.0}
    assert [report.interpolate(curve, x) for x in (1, 2.5, 4, 6, 10)] == pytest.approx([10, 13, 16, 24, 40])


def test_the_cost_model_is_its_formula() -> None:
    costs = {"steps": {1: 10.0, 4: 11.0, 5: 12.0}, "passes": {1: 2.0}, "overhead": {1: 0.5}}
    assert report.predict(1, 3.0, 4.0, 5.0, costs) == pytest.approx(3 * 10 / (4 * 2 + 12 + 0.5))


def test_figures_of_a_variant() -> None:
    plain = [_run([0.01] * 600, [1] * 600)]
    drafts = {"draft_tokens": 1200.0, "accepted_tokens": 600.0}
    own = [_run([0.015] * 600, [2] * 600, drafts=drafts, own={"num_passes": 1200, "draft_seconds": 1.8, "step_seconds": 9.0}, controller=[])]
    costs = {"steps": {1: 0.010, 3: 0.011}, "passes": {1: 0.0015}, "overhead": {1: 0.001}}
    figures = report.make_record(1, own, plain, costs)
    assert figures["ratio"] == pytest.approx(2 / 1.5)
    assert (figures["acceptance"], figures["token_ratio"], figures["tokens_per_turn"], figures["draft_length"]) == (0.5, 0.5, 2.0, 2.0)
    assert figures["draft_share"] == pytest.approx(0.2)
    assert figures["predicted"] == pytest.approx(2 * 0.010 / (2 * 0.0015 + 0.011 + 0.001))
    assert figures["same_tokens"] == 1


def test_new_records_take_the_place_of_old_ones() -> None:
    def make(variant: str, ratio: float) -> dict[str, Any]:
        return {"model": "demo", "temperature": 0.0, "context": "short", "batch": 1, "variant": variant, "ratio": ratio}

    merged = report.merge([make("plain", 1.0), make("ngram", 0.9)], [make("ngram", 0.8)])
    assert [(r["variant"], r["ratio"]) for r in merged] == [("plain", 1.0), ("ngram", 0.8)]
