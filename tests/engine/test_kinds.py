"""The kinds of levels: the same numbers for every backend, and a backend without one says so before anything is served."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from sedac.engine import backends
from sedac.engine.backends import choice, kinds
from sedac.engine.backends.cpu import CpuBackend
from sedac.engine.backends.levels import LevelTable
from sedac.engine.backends.torch import TorchBackend
from sedac.engine.step.state import State
from sedac.errors import UnsupportedModel
from sedac.policy.layout import Layout
from sedac.policy.model import MAX_LEVELS
from sedac.probe.levels import Level

CPU = torch.device("cpu")
WIDTH = Level(name="width-50", reduction="width", parameters_L=torch.tensor([32, 0], dtype=torch.int32))


def test_the_cpp_kernels_know_the_kinds_by_the_same_numbers():
    source = (Path(backends.__file__).parent / "kernels" / "state.h").read_text()
    (found,) = re.findall(r"enum Kind : uint8_t \{(.*?)\}", source, re.DOTALL)
    numbers = {name.lower(): int(number) for name, number in re.findall(r"k(\w+) = (\d+)", found)}
    assert numbers == {kind.name: number for number, kind in enumerate(kinds.KINDS) if kind.name in CpuBackend.kinds}
    assert re.findall(r"kMaxLevels = (\d+)", source) == [str(MAX_LEVELS)]


def test_kinds_are_found_by_name_and_have_numbers_of_their_own():
    assert [kinds.find_number(kind.name) for kind in kinds.KINDS] == list(range(len(kinds.KINDS)))
    assert [kind.name for kind in kinds.KINDS[:2]] == ["full", "skip"], "kernels compare with these two: what is over skip is a reduction"
    with pytest.raises(KeyError):
        kinds.find_number("unknown")


@pytest.mark.parametrize("base", [TorchBackend, CpuBackend])
def test_a_backend_refuses_levels_of_a_kind_that_it_lacks_by_name(base):
    class WithoutWidth(base):
        kinds = base.kinds - {"width"}

    table = LevelTable(2, (WIDTH,), (0.5,), 64, CPU)
    layout = Layout(num_layers=2, hidden_size=8, checkpoint_layers=(), probe_set="t", levels=table.names)
    with pytest.raises(UnsupportedModel, match=rf"level 'width-50' is of the kind 'width', which the {base.label} kernels lack .*SEDAC_LEVELS=0"):
        State(layout, {}, table, max_num_tokens=4, device=CPU, make_backend=WithoutWidth)
    assert State(layout, {}, table, max_num_tokens=4, device=CPU, make_backend=base).backend.kinds >= {"width"}


def test_the_backend_is_chosen_by_device_type_and_what_is_built(monkeypatch):
    assert choice.choose_backend(CPU, torch.float32) is CpuBackend, "build the kernels first: make setup"
    assert choice.choose_backend(CPU, torch.bfloat16) is CpuBackend
    assert choice.choose_backend(CPU, torch.float16) is TorchBackend
    monkeypatch.setattr(choice, "load", lambda: False)
    assert choice.choose_backend(CPU, torch.float32) is TorchBackend
