"""The floors of the house: what may import what, and what the control service must not load."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_import_contracts_hold():
    done = subprocess.run([str(Path(sys.executable).with_name("lint-imports"))], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("module", ["sedac.control.server.server", "sedac.ctl.root", "sedac.app.cli", "sedac.settings", "sedac.engine.vllm.plugin"])
def test_light_modules_load_neither_torch_nor_vllm(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'vllm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """What each module of the repository imports, wherever in it; whatever comes from elsewhere by the name of its package."""
    graph = grimp.build_graph("sedac", "sedac_probes", "testing", "benchmarks", include_external_packages=True, cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def test_nothing_but_tests_imports_tests(imports):
    assert "sedac.control.server.server" in imports, "the graph is that of the repository"
    assert [module for module, found in imports.items() if "tests" in found] == []


def find_circle(imports: dict[str, set[str]]) -> list[str]:
    """Return the names of a circle, the first again at the end; empty: there is none."""
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_each_other(imports):
    assert find_circle(imports) == []
    assert find_circle({**imports, "sedac.errors": {"sedac.app.cli"}}) != [], "a circle is seen"


@pytest.mark.parametrize("house", ["sedac", "sedac.engine", "sedac.control", "sedac_probes", "testing", "benchmarks"])
def test_no_rooms_import_each_other(imports, house):
    def find_room(module: str) -> str:
        return ".".join(module.split(".")[: house.count(".") + 2])

    rooms: dict[str, set[str]] = {}
    for module, found in imports.items():
        if module.startswith(f"{house}."):
            room = rooms.setdefault(find_room(module), set())
            room.update(find_room(other) for other in found if other.startswith(f"{house}.") and find_room(other) != find_room(module))
    assert len(rooms) > 1, "the graph is that of the repository"
    assert find_circle(rooms) == []


def _list_imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_tests_import_no_other_tests():
    """What they share is in testing/, or beside them in a module that is no test."""
    found = [(path, name) for path in (ROOT / "tests").rglob("*.py") for name in _list_imports(path) if name.startswith("tests.")]
    assert [(path, name) for path, name in found if name.rpartition(".")[2].startswith(("test_", "conftest"))] == []
