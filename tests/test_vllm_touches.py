"""Who may touch vLLM: engine/vllm, and one adapter each of the agent and of drafting; its private names nobody else."""

from __future__ import annotations

import ast
import sys
import types
from pathlib import Path

import pytest

SEDAC = Path(__file__).resolve().parents[1] / "service" / "sedac"
ADAPTERS = ("agent/frontend.py", "engine/drafting/parts.py", "bench/engine.py")


def find_sources() -> dict[str, ast.Module]:
    paths = [path for path in SEDAC.rglob("*.py") if not path.name.endswith(("_pb2.py", "_pb2_grpc.py"))]
    assert len(paths) > 100
    return {path.relative_to(SEDAC).as_posix(): ast.parse(path.read_text()) for path in paths}


SOURCES = find_sources()


def find_imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module or "")
    return {name for name in found if name.split(".")[0] == "vllm"}


def find_private(tree: ast.AST) -> set[str]:
    """Private attributes of other objects than `self` and `cls`, by name."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            found |= set() if is_own else {node.attr}
    return found


def find_own_names() -> set[str]:
    """Private names that SEDAC's own classes and modules define."""
    found = set()
    for tree in SOURCES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self":
                found.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return found


def is_free(path: str) -> bool:
    return path.startswith("engine/vllm/") or path in ADAPTERS


def test_only_the_adapters_import_vllm():
    found = {path: find_imports(tree) for path, tree in SOURCES.items()}
    assert {path: names for path, names in found.items() if names and not is_free(path)} == {}
    assert all(found[path] for path in ADAPTERS)


def test_private_names_of_others_stay_in_the_adapters():
    known = find_own_names() | {"_C", "_cuda_endAllocateToPool", "_Hash"}  # torch's and hashlib's
    found = {path: find_private(tree) - known for path, tree in SOURCES.items() if not is_free(path)}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("source", "imports", "private"),
    [
        ("import vllm.envs", {"vllm.envs"}, set()),
        ("def f():\n    from vllm.config import VllmConfig", {"vllm.config"}, set()),
        ("from sedac.engine.vllm import parts\nimport vllmish", set(), set()),
        ("runner._sample = 1\nself._mine = runner.batch._rows", set(), {"_sample", "_rows"}),
    ],
)
def test_what_is_looked_for_is_found(source, imports, private):
    tree = ast.parse(source)
    assert (find_imports(tree), find_private(tree)) == (imports, private)


def test_the_table_names_every_file_that_it_says_and_each_target_once():
    from sedac.engine.vllm.patches import TOUCHES

    assert [touch.used_by for touch in TOUCHES if not (SEDAC / touch.used_by).is_file()] == []
    targets = [touch.target for touch in TOUCHES]
    assert len(targets) == len(set(targets))


def test_a_vllm_without_its_platform_is_reported_by_name(monkeypatch):
    from sedac.engine.vllm import patches

    monkeypatch.setitem(sys.modules, "vllm.platforms", types.ModuleType("vllm.platforms"))
    problems = {row.touch.target: row.problem for row in patches.check_all() if row.problem}
    assert "vllm.platforms:current_platform" in problems
    assert not any(row.touch.cpu_only for row in patches.check_all())


def test_the_table_has_every_module_that_is_imported_by_the_adapters():
    """Public parts too: what SEDAC would not run without is checked before weights are loaded."""
    from sedac.engine.vllm.patches import TOUCHES

    listed = {touch.target.partition(":")[0] for touch in TOUCHES}
    imported = set().union(*(find_imports(tree) for path, tree in SOURCES.items() if is_free(path)))
    assert {name for name in imported if not any(known == name or known.startswith(f"{name}.") for known in listed)} == set()
