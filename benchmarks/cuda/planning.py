"""Which rows there are and in which order: by shape, so that weights are made once, and within a shape the most telling first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cases import CASES, FORMS, PLANS, TINY

Row = dict[str, Any]
TOKENS = (1, 4, 16, 64, 256)
TELLING_TOKENS = (1, 16, 256)
PREPARATION: tuple[Row, ...] = ({"part": "card"}, {"part": "nodes"})
"""before any other row: what the card is and reaches, and whether it can run what is captured"""
CAPTURED_ROWS = {"few": (1, 2, 5, 16), "middle": (1, 16, 17, 33, 64, 127), "many": (128, 200, 256)}
"""The numbers of rows of the graphs that are checked: the bounds of each form and something between them."""
CAPTURED_FORMS = {"levels": FORMS, "plain": ("middle", "many"), "other": ("middle",), "own": ("few", "middle"), "repaired": FORMS}
"""The forms that each kind of MLP (mlps.MLPS) is captured in."""


def plan_kernels(shapes: Sequence[str], tokens: Sequence[int] = TOKENS, *, dtype: str = "bfloat16", **more: Any) -> list[Row]:
    """Return the rows of the reduced MLP and of the checkpoint at these shapes; `more` goes into the MLP's rows."""
    rows = []
    for shape in shapes:
        kernels = [
            (case.is_telling and t in TELLING_TOKENS, {"part": "kernels", "shape": shape, "dtype": dtype, "tokens": t, "case": case.name} | more)
            for t in tokens
            for case in CASES
        ]
        probes = [{"part": "probe", "shape": shape, "dtype": dtype, "tokens": t} for t in tokens]
        rows += [row for is_telling, row in kernels if is_telling]
        rows += probes
        rows += [row for is_telling, row in kernels if not is_telling]
    return rows


def plan_kernel_checks(tokens: Sequence[int], probe_tokens: Sequence[int], forms: Sequence[str] = FORMS) -> list[Row]:
    """Return the rows that check every case, form and type on a tiny shape, with repaired projections."""
    rows: list[Row] = []
    for dtype in ("float32", "float16", "bfloat16"):
        common = {"shape": TINY.name, "dtype": dtype}
        for t in tokens:
            rows += [
                {"part": "kernels", **common, "tokens": t, "case": case.name, "form": form, "repaired": True} for case in CASES for form in forms
            ]
        rows += [{"part": "probe", **common, "tokens": t} for t in probe_tokens]
    return rows


def plan_steps(shapes: Sequence[str], tokens: Sequence[int], caches: Sequence[int], *, dtype: str = "bfloat16", pattern: str = "") -> list[Row]:
    """Return the rows of whole decoder steps; `pattern`: a part of the plans' names."""
    rows = []
    plans = sorted((plan for plan in PLANS if pattern in plan.name), key=lambda plan: not plan.is_telling)
    for shape in shapes:
        for cache in caches:
            for t in tokens:
                rows += [{"part": "step", "shape": shape, "dtype": dtype, "tokens": t, "cache": cache, "plan": plan.name} for plan in plans]
    return rows


def plan_captured(shape: str, dtype: str, *, weights: Sequence[str] = tuple(CAPTURED_FORMS), forms: Sequence[str] = FORMS) -> list[Row]:
    """Return the rows that check captured graphs of every form that these kinds of MLPs have, at the numbers of rows around its bounds."""
    return [
        {"part": "captured", "shape": shape, "dtype": dtype, "tokens": t, "form": form, "weights": kind}
        for kind in weights
        for form in forms
        for t in CAPTURED_ROWS[form]
        if form in CAPTURED_FORMS[kind]
    ]


def plan_captured_checkpoints(shape: str, dtype: str, tokens: Sequence[int] = (1, 2, 5, 16, 17, 64, 200, 256)) -> list[Row]:
    """Return the rows that check captured checkpoints."""
    return [{"part": "captured checkpoints", "shape": shape, "dtype": dtype, "tokens": t} for t in tokens]


def plan_swaps(count: int) -> list[Row]:
    """Return the row that swaps policies and probes between passes."""
    return [{"part": "swaps", "swaps": count}]


def find_form(num_tokens: int) -> str:
    """Return the form that a large MLP takes at so many tokens (sedac/engine/backends/cuda/forms.py)."""
    return FORMS[0] if num_tokens <= 16 else FORMS[1] if num_tokens < 128 else FORMS[2]
