"""What tests rely on when a program runs in a forked process: it finds vLLM imported, and all else as if it were started on its own."""

from __future__ import annotations

import os
import subprocess
import time

import psutil
import pytest

from testing.forked import run_python

pytestmark = pytest.mark.engine


def test_a_program_finds_vllm_imported_and_its_own_surroundings(tmp_path):
    code = "import os, sys; print('vllm' in sys.modules, sys.argv, os.environ['WORD'], 'HOME' in os.environ, os.getcwd()); sys.exit('no')"
    done = run_python("-c", code, "a", "b", env={"WORD": "here"}, cwd=tmp_path)
    assert done.stdout.split(maxsplit=1) == ["True", f"['-c', 'a', 'b'] here False {tmp_path}\n"]
    assert (done.returncode, done.stderr.strip()) == (1, "no")
    assert "WORD" not in os.environ


def test_files_and_modules_run_as_programs(tmp_path):
    (tmp_path / "program.py").write_text("import sys\nimport beside\nif __name__ == '__main__':\n    print(beside.WORD, sys.argv[1:])\n")
    (tmp_path / "beside.py").write_text("WORD = 'found'\n")
    for command, cwd in (([tmp_path / "program.py", "x"], "/"), (["-m", "program", "x"], tmp_path)):
        assert run_python(*command, cwd=cwd).stdout == "found ['x']\n", command


def test_what_takes_too_long_is_killed_with_its_children(tmp_path):
    code = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        run_python("-c", code, timeout=3)
    child, deadline = int(caught.value.stdout), time.monotonic() + 10
    while _is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(child)


def _is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
