"""Figures of streams whose times are known, of one that was recorded from vLLM, and of counters as servers show them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from sedac.bench.figures import measure_counters, measure_streams, percentile, read_counters
from sedac.bench.load import Stream, read_stream
from sedac.bench.quality import compare, summarise
from sedac.bench.results import pair_rounds, summarise_rounds

RECORDED = Path(__file__).with_name("recorded.json")
"""An answer of 64 tokens by plain vLLM 0.32 with the demo model: when bytes arrived, in seconds since the request, and the bytes."""


def test_a_recorded_answer_has_the_tokens_that_its_usage_says():
    pieces = [(arrived, data.encode()) for arrived, data in json.loads(RECORDED.read_text())]
    stream = read_stream(0.0, pieces)
    assert stream.num_tokens == len(stream.token_ids) == sum(stream.tokens) == 64
    assert stream.arrivals == sorted(stream.arrivals)
    whole = read_stream(0.0, [(pieces[-1][0], b"".join(data for _, data in pieces))])
    assert whole.token_ids == stream.token_ids
    figures = measure_streams([stream])
    assert figures["tokens_per_second"] == pytest.approx(64 / stream.ended)
    assert figures["ttft_ms_p50"] == figures["ttft_ms_p99"] == pytest.approx(1e3 * stream.arrivals[0])
    assert figures["itl_ms_p50"] <= figures["itl_ms_p99"] <= figures["gap_ms_p99"] + 1e-9


def test_tokens_that_come_together_share_the_time_that_they_took():
    stream = Stream(began=10.0, arrivals=[10.5, 10.7, 10.8], tokens=[1, 4, 1], num_tokens=6)
    figures = measure_streams([stream])
    assert figures["ttft_ms_p50"] == pytest.approx(500)
    assert figures["itl_ms_p50"] == pytest.approx(50), "four tokens of 50 ms and one of 100 ms"
    assert figures["itl_ms_p99"] == pytest.approx(100)
    assert figures["gap_ms_p99"] == pytest.approx(200)
    assert figures["tokens_per_second"] == pytest.approx(6 / 0.8)


def test_a_cell_lasts_from_its_first_request_to_its_last_token():
    streams = [
        Stream(began=1.0, arrivals=[2.0, 3.0], tokens=[1, 1], num_tokens=2),
        Stream(began=2.0, arrivals=[2.5, 6.0], tokens=[1, 1], num_tokens=2),
    ]
    figures = measure_streams(streams)
    assert (figures["seconds"], figures["tokens_per_second"], figures["num_requests"]) == (5.0, pytest.approx(0.8), 2)
    assert (figures["ttft_ms_p50"], figures["ttft_ms_p99"]) == (pytest.approx(500), pytest.approx(1000))


def test_percentiles_are_values_that_were_measured():
    assert [percentile([3.0, 1.0, 2.0, 4.0], share) for share in (0.0, 0.25, 0.5, 0.75, 0.99, 1.0)] == [1, 1, 2, 3, 4, 4]
    assert percentile([], 0.5) is None


def test_answers_in_one_piece_have_no_time_between_pieces():
    figures = measure_streams([Stream(began=0.0, arrivals=[0.5], tokens=[8], num_tokens=8)])
    assert (figures["tokens_per_second"], figures["itl_ms_p50"], figures["gap_ms_p99"]) == (16, None, None)


PAGE = """# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="bench"} 100.0
vllm:generation_tokens_created{engine="0",model_name="bench"} 1.7e+09
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="bench"} 80.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="bench"} 60.0
sedac_tokens_total{engine="0",model_name="bench"} 200.0
sedac_decode_tokens_total{engine="0",model_name="bench"} 50.0
sedac_mlp_blocks_computed_total{engine="0",model_name="bench"} 2250.5
sedac_layers{engine="0",model_name="bench"} 12.0
"""


def test_counters_are_read_and_summed_over_engines():
    found = read_counters(PAGE + PAGE.replace('engine="0"', 'engine="1"').replace("12.0", "0.0"))
    assert found["vllm:generation_tokens_total"] == 200
    assert found["sedac_layers"] == 12
    assert "vllm:generation_tokens_created" not in found


def test_counters_tell_acceptance_token_ratio_and_work_saved():
    found = measure_counters({"sedac_layers": 12.0}, read_counters(PAGE))
    assert found == {"acceptance_rate": 0.75, "token_ratio": 0.6, "work_saved": pytest.approx((200 * 12 - 2250.5) / (50 * 12))}


def test_what_a_server_does_not_do_is_no_figure():
    plain = {"vllm:generation_tokens_total": 10.0}
    assert measure_counters(plain, {"vllm:generation_tokens_total": 20.0}) == {"acceptance_rate": None, "token_ratio": None, "work_saved": None}
    nothing_reduced = measure_counters({}, {"sedac_layers": 12.0, "sedac_tokens_total": 9.0, "sedac_mlp_blocks_computed_total": 108.0})
    assert nothing_reduced["work_saved"] == 0


def test_ratios_are_of_the_same_round():
    ours, plain = {0: 10.0, 1: 30.0, 2: 8.0, 5: 1.0}, {0: 20.0, 1: 30.0, 2: 4.0, 4: 1.0}
    assert pair_rounds(ours, plain) == {"median": 1.0, "min": 0.5, "max": 2.0, "rounds": 3}
    assert pair_rounds({}, plain) is None


def test_rounds_without_a_figure_do_not_count():
    assert summarise_rounds([None, 2.0, math.nan, 4.0]) == {"median": 3.0, "min": 2.0, "max": 4.0, "rounds": 2}
    assert summarise_rounds([None, math.nan]) is None


def test_agreement_counts_equal_answers_and_tokens_before_the_first_difference():
    plain = [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert compare(plain, plain) == (1.0, 1.0)
    assert compare([[1, 2, 3, 4], [5, 6, 0, 8]], plain) == (0.5, 0.75)
    assert compare([[0, 2, 3, 4], [0, 6, 7, 8]], plain) == (0.0, 0.0)


def test_the_perplexity_ratio_is_what_the_texts_lose_and_plains_is_one():
    found = {"plain": {"answers": [[1]], "loss": 2.0}, "ours": {"answers": [[1]], "loss": 2.01}, "other": {"answers": [[2]], "loss": None}}
    ratios = {name: figures["perplexity_ratio"] for name, figures in summarise(found).items()}
    assert ratios == {"plain": 1.0, "ours": pytest.approx(math.exp(0.01)), "other": None}
    assert summarise({"ours": found["ours"]}) == {}
