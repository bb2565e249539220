"""What is measured stays measured: a run goes on where it was, and a folder never mixes two matrices."""

from __future__ import annotations

import pytest
from sedac.bench.cells import Cells
from sedac.bench.online import count_steps, is_measured, list_missing
from sedac.bench.reading import make_matrix
from sedac.errors import ConfigError

HEADER = {"name": "one", "digest": "d1", "mode": "online", "versions": {"vllm": "0.32.0"}, "machine": {}, "matrix": {}}
MATRIX = make_matrix(
    {
        "name": "one",
        "systems": [{"name": "plain", "kind": "plain"}, {"name": "ours", "kind": "sedac", "tiers": ["exact", "balanced"]}],
        "concurrencies": [1, 4],
        "rounds": 2,
        "quality": {},
    }
)
MODEL = MATRIX.models[0]


def add(cells: Cells, row: str = "plain", load: str = "concurrency 1", number: int = 0) -> None:
    cells.add("cell", model="demo", row=row, load=load, round=number, figures={"tokens_per_second": 1.0})


def test_cells_are_there_again_and_the_next_run_is_another_session(tmp_path):
    first = Cells(tmp_path, HEADER)
    add(first)
    assert first.session == 0
    second = Cells(tmp_path, HEADER)
    assert second.get_done() == {("demo", "plain", "concurrency 1", 0)}
    assert second.session == 1
    add(second, number=1)
    assert [line["session"] for line in Cells(tmp_path, HEADER).get_all("cell")] == [0, 1]


def test_a_line_that_was_broken_off_is_measured_again(tmp_path):
    cells = Cells(tmp_path, HEADER)
    add(cells)
    add(cells, number=1)
    whole = cells.path.read_bytes()
    for cut in (1, 20):
        cells.path.write_bytes(whole[:-cut])
        again = Cells(tmp_path, HEADER)
        assert again.get_done() == {("demo", "plain", "concurrency 1", 0)}
        add(again, number=1)
        assert len(Cells(tmp_path, HEADER).get_done()) == 2


def test_a_line_broken_in_the_middle_is_an_error_that_names_it(tmp_path):
    cells = Cells(tmp_path, HEADER)
    add(cells)
    lines = cells.path.read_text().splitlines()
    cells.path.write_text("\n".join([lines[0], "{", lines[1]]) + "\n")
    with pytest.raises(ConfigError, match=r"cells.jsonl:2 is broken"):
        Cells(tmp_path, HEADER)


@pytest.mark.parametrize("other", [{"digest": "d2", "name": "two"}, {"versions": {"vllm": "0.32.1"}}, {"mode": "offline"}])
def test_the_folder_of_another_matrix_version_or_mode_is_refused_by_name(tmp_path, other):
    Cells(tmp_path, HEADER)
    with pytest.raises(ConfigError) as caught:
        Cells(tmp_path, {**HEADER, **other})
    assert [w for w in (str(tmp_path), "'one'", repr(other.get("name", "one")), "another --out") if w not in str(caught.value)] == []


def test_what_is_missing_is_what_was_not_measured(tmp_path):
    cells = Cells(tmp_path, HEADER)
    assert len(list_missing(MATRIX, MODEL, cells)) == 3 * 2 * 2 + 3
    for row in ("plain", "ours, exact", "ours, balanced"):
        for load in ("concurrency 1", "concurrency 4"):
            add(cells, row, load)
            add(cells, row, load, 1)
    assert is_measured(MATRIX, MODEL, cells)
    assert [key[1:3] for key in list_missing(MATRIX, MODEL, cells)] == [(r, "quality") for r in ("plain", "ours, exact", "ours, balanced")]
    for row in ("plain", "ours, exact", "ours, balanced"):
        cells.add("quality", model="demo", row=row, answers=[[1]], loss=None)
    assert list_missing(MATRIX, MODEL, cells) == []


def test_progress_counts_starts_idle_servers_and_rounds_that_warm_up(tmp_path):
    cells = Cells(tmp_path, HEADER)
    assert count_steps(MATRIX, MATRIX.models, cells) == (3 * 2 * 2 + 3) + 2 + 2 + 3 * 2
