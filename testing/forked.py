"""Python programs that need vLLM, in processes forked from one that has imported it: importing takes longer than most of them run.

One server per process of pytest (multiprocessing's `forkserver`, with forkserver.py preloaded). A program finds what it would find if it
were started on its own, but for what the imports had done by then: environment variables that a library reads when it is imported come too
late. Such programs, those that are killed half way and all that the product itself starts are started on their own.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_TOP_PAD_": str(64 << 20)}
"""environment in which the C library keeps memory that was freed: giving back every tensor's takes longer than computing small ones"""

_STARTING = threading.Lock()
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["testing.forkserver"])


def _start_server() -> None:
    """Start the fork server where there is none, in an environment of its own; what it read of that when it started stays with its children."""
    with _STARTING:
        before = dict(os.environ)
        os.environ.update(MEMORY)
        try:
            multiprocessing.forkserver.ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(before)


def run_python(
    *arguments: str | Path, env: Mapping[str, str] | None = None, cwd: str | Path | None = None, timeout: float = 900, all_cores: bool = False
) -> subprocess.CompletedProcess[str]:
    """Do what `python ARGUMENTS...` does (`-m MODULE ...`, `-c CODE ...` or `FILE ...`), and return its code and its output as text.

    `all_cores`: let it run on every core of the machine, also where tests share them out (conftest.py).

    Raises:
        subprocess.TimeoutExpired: it ran for more than `timeout` seconds, and was killed with all that it had started.
    """
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as directory:
        outputs = [Path(directory) / name for name in ("stdout", "stderr")]
        environment = dict(os.environ if env is None else env)
        process = _CONTEXT.Process(target=_run, args=(words, environment, str(cwd or Path.cwd()), outputs, all_cores))
        _start_server()
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            raise subprocess.TimeoutExpired(words, timeout, *(path.read_bytes() for path in outputs))
        return subprocess.CompletedProcess(words, process.exitcode, *(path.read_text() if path.exists() else "" for path in outputs))


def _run(arguments: list[str], environment: dict[str, str], directory: str, outputs: list[Path], all_cores: bool) -> None:
    os.setsid()
    for descriptor, path in enumerate(outputs, start=1):
        file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    if all_cores:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    _use_threads()
    first, *rest = arguments
    if first == "-m":
        sys.argv = rest
        sys.path[0] = directory
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path[0] = ""
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path[0] = str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


def _use_threads() -> None:
    """Take as many threads as a process that starts here would."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
