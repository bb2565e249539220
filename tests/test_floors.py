"""The floors of the house: what may import what, and what the control service must not load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
