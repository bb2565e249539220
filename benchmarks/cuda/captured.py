"""The truth of what is captured: one graph, replayed under one step after another, must give each step's own result, in float64.

MLPs: one graph per form and number of rows; levels flip between replays, rows past the step's tokens hold NaN. Checkpoints: one graph
of two of them; policies and roles flip, and the plain torch form on the CPU is what decisions are held against. All that a replay
writes is poisoned before it. On a CPU the very same runs anew each time, under Triton's interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from cases import FORMS, FULL, SKIP, Case, get_shape
from held import hold
from measured import DTYPES, get_device, warm_up
from mlps import CheckFailed, Mlps
from replay import Replay, poison_scratch

HALF = Case(name="half", level=FULL, active=0.5)
"""about half the neurons pass a contextual row's threshold, and a width keeps half"""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One step of a captured pass."""

    name: str
    levels: Sequence[int] | None
    """The levels of the live rows; with None no step runs, and the graph is replayed all the same."""
    promised: bool = False


def make_scenes(num_rows: int) -> list[Scene]:
    """Return steps whose levels flip from one to the next, some with fewer tokens than the graph has rows."""
    live = max(1, num_rows - max(1, num_rows // 3))
    return [
        Scene(name="full", levels=[0] * num_rows),
        Scene(name="skip", levels=[1] * num_rows),
        Scene(name="width", levels=[3] * num_rows),
        Scene(name="no step", levels=None),
        Scene(name="contextual", levels=[2] * num_rows),
        Scene(name="mixed", levels=[t % 4 for t in range(num_rows)]),
        Scene(name="mixed, none full, padded", levels=[1 + t % 3 for t in range(live)]),
        Scene(name="skip, padded", levels=[1] * live),
        Scene(name="mixed, promised, padded", levels=[(t + 1) % 4 for t in range(live)], promised=True),
        Scene(name="contextual and width", levels=[2 + t % 2 for t in range(num_rows)]),
        Scene(name="one full, the others skip", levels=[int(t > 0) for t in range(num_rows)]),
        Scene(name="full, promised", levels=[0] * num_rows, promised=True),
        Scene(name="full, padded", levels=[0] * live),
    ]


def run_row(spec: dict[str, Any], context: dict[str, Any]) -> dict[str, Any]:
    """Check the graphs of one form, number of rows and type: once with every tensor poisoned, once with memory shared as an engine shares it.

    Raises:
        CheckFailed: a replay gave something else, or left something unwritten, or gave other bits the second time.
    """
    shape, device = get_shape(spec["shape"], is_tiny=context["is_check"]), get_device(context)
    dtype, repaired = DTYPES[spec["dtype"]], spec["weights"] == "repaired"
    mlps = hold(("captured", shape, dtype, repaired), lambda: Mlps(shape, 2, dtype, device, repaired=repaired))
    num_replays, worst = 0, 0.0
    for keeps in (True, False) if context["captures"] else (False,):
        done, error = check_mlps(mlps, FORMS.index(spec["form"]), spec["tokens"], spec["weights"], keeps=keeps, captures=context["captures"])
        num_replays, worst = num_replays + done, max(worst, error)
    return {"replays": num_replays, "error": worst}


def check_mlps(mlps: Mlps, form: int, num_rows: int, kind: str, *, keeps: bool, captures: bool) -> tuple[int, float]:
    """Capture once and replay under every scene, a graph twice; return the number of replays and the largest relative error of a row.

    Raises:
        CheckFailed: see `run_row`.
    """
    x_TD = torch.randn(num_rows, mlps.shape.hidden_size, device=mlps.device).to(mlps.dtype)
    mlps.prepare(HALF, [x_TD] * len(mlps.weights), form, kind=kind)
    replay = Replay(
        lambda: [mlp.compute(x_TD) for mlp in mlps.mlps], captures=captures, warm_up=lambda: warm_up(mlps, [x_TD] * len(mlps.mlps)), keeps=keeps
    )
    num_replays, worst, state = 0, 0.0, mlps.state
    for scene in make_scenes(num_rows):
        levels = scene.levels or [FULL] * num_rows
        if kind in ("plain", "other"):
            levels = [level if level <= SKIP else FULL for level in levels]
        memory = "memory shared" if captures and not keeps else "all poisoned"
        where = f"{mlps.shape.name}, {mlps.dtype}, {FORMS[form]}, {kind}, {num_rows} rows, {scene.name}, {memory}"
        x_TD.copy_(torch.randn_like(x_TD, dtype=torch.float32))
        if scene.levels is not None:
            x_TD[len(levels) :] = math.nan
        seen: list[torch.Tensor] = []
        for number in range(2 if captures or scene.name == "mixed" else 1):  # what runs anew each time has one order of sums
            mlps.end()
            poison_scratch(state)
            if scene.levels is not None:
                mlps.begin(levels, promised=scene.promised)
            outputs = [out_TD[: len(levels)].clone() for out_TD in replay.run_poisoned()]
            num_replays += 1
            if number and not all(torch.equal(a, b) for a, b in zip(seen, outputs, strict=True)):
                raise CheckFailed(f"{where}: the same step gave other bits the second time")
            seen = outputs
            if state.is_active:
                _check_saved(mlps, levels, where)
        worst = max(worst, *(mlps.check(layer, x_TD, levels, out_TD, where) for layer, out_TD in enumerate(seen)))
    mlps.end()
    return num_replays, worst


def _check_saved(mlps: Mlps, levels: Sequence[int], where: str) -> None:
    """What a step counts as saved: all of a skipped row, nothing of a full one, something between of the others.

    Raises:
        CheckFailed: it counted otherwise.
    """
    count = len(mlps.mlps)
    saved = mlps.state.saved_T[: len(levels)].tolist()
    for t, (level, value) in enumerate(zip(levels, saved, strict=True)):
        low, high = {FULL: (0, 0), SKIP: (count, count)}.get(level, (0, count))
        if not low - 1e-5 <= value <= high + 1e-5:
            raise CheckFailed(f"{where}: row {t} at level {level} counts {value} MLPs of {count} as saved")
