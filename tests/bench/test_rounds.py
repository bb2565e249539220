"""The order of measurements: all of them, together by load, fair to every row, and the same from run to run."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st
from sedac.bench.matrix import Load
from sedac.bench.prompts import make_starts
from sedac.bench.rounds import order_round

LOADS = [Load(concurrency=1), Load(concurrency=4), Load(rate=2.0)]
ROWS = ["plain", "a", "b", "c", "d"]


@given(number=st.integers(0, 50), seed=st.integers(0, 5), rows=st.integers(1, 7), loads=st.integers(1, 3))
def test_a_round_measures_everything_once_and_the_rows_of_a_load_together(number, seed, rows, loads):
    order = order_round(list(range(rows)), LOADS[:loads], number, seed)
    assert sorted(order) == [(place, row) for place in range(loads) for row in range(rows)]
    places = [place for place, _ in order]
    assert all(len(set(places[start : start + rows])) == 1 for start in range(0, len(places), rows))
    assert order == order_round(list(range(rows)), LOADS[:loads], number, seed)


def test_in_as_many_rounds_as_rows_each_row_is_first_once_at_every_load():
    for place in range(len(LOADS)):
        firsts = [next(row for at, row in order_round(ROWS, LOADS, number) if at == place) for number in range(len(ROWS))]
        assert sorted(firsts) == sorted(ROWS)


def test_neighbours_change_and_another_seed_is_another_order():
    def follow(number):
        order = [row for place, row in order_round(ROWS, LOADS[:1], number) if place == 0]
        return set(itertools.pairwise(order))

    assert follow(0) != follow(1)
    assert order_round(ROWS, LOADS, 0, seed=0) != order_round(ROWS, LOADS, 0, seed=1)


def test_no_two_cells_begin_with_the_same_prompt():
    starts = make_starts([2, 8, 32], 3)
    assert starts == [[0, 2, 10], [42, 44, 52], [84, 86, 94]]
