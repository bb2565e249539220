"""The order of the measurements: every row at every load once in a round, and no row always first."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from sedac.bench.matrix import Load

_T = TypeVar("_T")


def order_round(rows: Sequence[_T], loads: Sequence[Load], number: int, seed: int = 0) -> list[tuple[int, _T]]:
    """Return pairs of a load's number and a row in the order in which round `number` measures them.

    All rows of a load follow each other, so that what is compared was measured within the same minutes. Their order is one shuffle by
    `seed`, begun one row later from round to round and read backwards in every other one: in as many rounds as there are rows, each
    row is first once, and its neighbours change.
    """
    places = list(range(len(loads)))
    random.Random(f"{seed} loads {number}").shuffle(places)
    found = []
    for place in places:
        shuffled = list(rows)
        random.Random(f"{seed} rows {place}").shuffle(shuffled)
        start = number % len(shuffled)
        turned = shuffled[start:] + shuffled[:start]
        found += [(place, row) for row in (turned[:1] + turned[:0:-1] if number % 2 else turned)]
    return found
