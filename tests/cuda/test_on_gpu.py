"""What only a GPU can tell: that captured graphs write each step's own result, that IF nodes work, and which bits come out.

Skipped where there is none; benchmarks/cuda runs the same checks of captured graphs under Triton's interpreter (test_benchmarks.py).
"""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks" / "cuda"
CONTEXT = {"is_check": False, "captures": True, "rounds": 3}

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here; CUDA graphs, IF nodes and bf16 bits need one")


@pytest.fixture(autouse=True)
def _paths(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    torch.manual_seed(0)


def check_rows(module: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run rows of a part in this process, each checked against its reference; the first that is wrong raises."""
    run_row = importlib.import_module(module).run_row
    with torch.no_grad():
        return [run_row(row, CONTEXT) for row in rows]


def plan(name: str, *arguments: Any, **more: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = getattr(importlib.import_module("planning"), name)(*arguments, **more)
    assert rows
    return rows


def test_if_nodes_work():
    if_nodes = importlib.import_module("sedac.engine.backends.cuda.if_nodes")
    assert if_nodes.check() == ""


@pytest.mark.parametrize("weights", ["levels", "plain", "other", "own", "repaired"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", ["tiny", "Qwen2.5-0.5B"])
def test_a_captured_mlp_gives_every_step_its_own_levels(shape, dtype, weights):
    check_rows("captured", plan("plan_captured", shape, dtype, weights=(weights,)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", ["tiny", "Qwen2.5-7B"])
def test_captured_checkpoints_decide_as_plain_torch(shape, dtype):
    check_rows("captured_checkpoints", plan("plan_captured_checkpoints", shape, dtype))


def test_a_captured_step_equals_float64():
    check_rows("stepped", plan("plan_steps", ["tiny"], (1, 5, 33), (9,), dtype="float32"))


def test_a_swap_between_replays_is_seen_whole_by_the_next():
    (found,) = check_rows("swaps", plan("plan_swaps", 500))
    assert [found[name] for name in ("swaps", "mixed", "late", "moved")] == [500, 0, 0, 0]


@pytest.mark.parametrize("kind", ["levels", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", [1, 16, 200])
def test_the_activation_has_the_compilers_bits(dtype, num_rows, kind):
    """Rows at level `full` of an MLP whose products are given: what is left is the activation, which plain vLLM leaves to the compiler."""
    mlps = importlib.import_module("mlps")
    cases = importlib.import_module("cases")
    device, size = torch.device("cuda"), 1024
    shape = cases.Shape(name="square", hidden_size=size, num_neurons=size, num_layers=2)
    made = mlps.Mlps(shape, 2, dtype, device)
    product_TF = (torch.randn(num_rows, 2 * size, device=device) * 4).to(dtype)
    compiled = torch.compile(lambda product: functional.silu(product[:, :size]) * product[:, size:], dynamic=False)
    x_TD = torch.randn(num_rows, size, device=device).to(dtype)
    made.prepare(cases.get_case("nothing reduced"), [x_TD, x_TD], cases.FORMS.index("middle"), kind=kind)
    parts = dataclasses.replace(made.mlps[0].parts, gate_up=lambda x: product_TF, down=lambda h: h.clone())
    mlp = dataclasses.replace(made.mlps[0], parts=parts)
    made.begin([cases.FULL] * num_rows)
    assert torch.equal(mlp.compute(x_TD), compiled(product_TF))
