"""What a capture records: IF nodes begin with the flag, end after the body, nest, and end also where the body fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from sedac.engine.backends.cuda import forms, guard, if_nodes

from tests.cuda.interpreted.cases import Case, D

streams: list[Any] = []


@contextmanager
def capture() -> Iterator[list[tuple[str, int]]]:
    """Pretend that a graph is being captured, and list its nodes; the host may not look at a tensor meanwhile."""
    nodes: list[tuple[str, int]] = []
    streams.clear()

    class Nodes:
        name = "noted"

        @contextmanager
        def open(self, wanted: torch.Tensor, body: Any) -> Iterator[None]:
            assert (wanted.dtype, wanted.numel()) == (torch.bool, 1)
            nodes.append(("if", wanted.data_ptr()))
            streams.append(body)
            try:
                yield
            finally:
                nodes.append(("end", 0))

    captured = if_nodes.Capture(Nodes())
    captured._streams = ["outer", "inner"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guard, "is_capturing", lambda: True)
        patch.setattr("sedac.engine.backends.cuda.mlp.is_capturing", lambda: True)
        patch.setattr(if_nodes, "get", lambda: captured)
        patch.setattr(torch.Tensor, "__bool__", lambda self: pytest.fail("the host read a flag while capturing"))
        yield nodes


def test_a_body_is_captured_whatever_the_flag_says():
    with capture() as nodes:
        for value in (False, True):
            assert guard.run_if(torch.tensor(value), lambda: 7) == 7
    assert [kind for kind, _ in nodes] == ["if", "end"] * 2


def test_a_failing_body_closes_its_node():
    def fail() -> None:
        raise ValueError("the body's own")

    with capture() as nodes, pytest.raises(ValueError, match="the body's own"):
        guard.run_if(torch.tensor(True), fail)
    assert [kind for kind, _ in nodes] == ["if", "end"]


@pytest.mark.parametrize("form", [forms.FEW, forms.MIDDLE, forms.MANY])
def test_an_mlp_captures_its_products_and_their_repair(form):
    case = Case(torch.float32, repaired=True)
    device, mlp, x = case.state.backend, case.make(1, form), torch.randn(5, D)
    with capture() as nodes:
        mlp.compute(x)
    dense, repair = device.dense_GL[form, 1].data_ptr(), device.repair_GL[form, 1].data_ptr()
    assert nodes == [("if", dense), ("if", repair), ("end", 0), ("end", 0)]
    assert streams == ["outer", "inner"], "a body's stream goes by its depth"
    with capture():
        for _ in range(3):
            mlp.compute(x)
    assert streams == ["outer", "inner"] * 3, "the same ones for all bodies, and so one workspace and one place for what they free"


def test_a_captured_pass_allocates_by_shape_alone(monkeypatch):
    """The same sizes for all levels: nothing that a graph froze depends on values."""
    case, sizes, real = Case(torch.float32), [], torch.Tensor.new_empty
    mlps = [case.make(0, form) for form in (forms.FEW, forms.MIDDLE, forms.MANY)]
    for levels in ([0, 0, 0], [1, 1, 1], [2, 5, 3]):
        case.begin(levels)
        x, made = torch.randn(3, D), []

        def record(tensor, shape, made=made, **more):
            made.append(shape)
            return real(tensor, shape, **more)

        with capture(), monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "new_empty", record)
            for mlp in mlps:
                mlp.compute(x)
        sizes.append(made)
        case.state.end_step()
    assert sizes[0]
    assert sizes[0] == sizes[1] == sizes[2]
