"""The processes of benchmarks/cuda/engine.py, seen from outside: their environment, their orders, their ends.

A process that dies, hangs or refuses again and again has a `fault` and is asked nothing any more.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
PLUGIN = "[vllm.general_plugins]\nsedac = sedac.engine.vllm.plugin:register\n"
_MAX_ERRORS = 3
"""How many errors in a row end a process: a GPU's error leaves one that can do nothing more."""
_LOG_LINES, _LINE_CHARS = 4, 240
_STACK_SECONDS = 1.0
TERM_SECONDS, _KILL_SECONDS = 3.0, 1.0


class EngineFault(Exception):
    """An engine did not do what it was told; its message says what its log ended with."""


def make_slug(name: str) -> str:
    """Return an engine's name as files are called after it."""
    return name.lower().replace(",", "").replace(" ", "-")


def write_plugin(folder: Path) -> None:
    """Write the metadata by which vLLM finds SEDAC's plugin, for a checkout that is on the path and not installed."""
    info = folder / "sedac-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sedac\nVersion: 0\n")
    (info / "entry_points.txt").write_text(PLUGIN)


def make_environment(name: str, work: Path, *, is_v2: bool, is_ours: bool, vllm: Path | None, on_cpu: bool) -> dict[str, str]:
    """Return the environment of one engine's process: where its Python is found, its runner, its plugins and caches of its own."""
    site = work / "site"
    is_installed = bool(importlib.metadata.entry_points(group="vllm.general_plugins", name="sedac"))
    if not is_installed:
        write_plugin(site)
    folders = [*([] if is_installed else [site]), *([vllm] if vllm else []), REPOSITORY / "service"]
    caches = work / "caches" / make_slug(name)
    caches.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        "VLLM_PLUGINS": "sedac" if is_ours else "",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if is_v2 else "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CACHE_ROOT": str(caches / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo",  # there may be no other network
    }  # fmt: skip
    environment.pop("SEDAC_ENABLED", None)
    if on_cpu:
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    return environment


class EngineProcess:
    """One engine, started when this is made."""

    def __init__(
        self, name: str, options: dict[str, Any], environment: dict[str, str], *, work: Path, logs: Path, script: Path = HERE / "engine_child.py"
    ) -> None:
        slug = make_slug(name)
        order = work / f"{slug}.json"
        order.write_text(json.dumps({"llm": options, "lock": str(work / "lock")}))
        logs.mkdir(parents=True, exist_ok=True)
        self.name, self.log_path, self.fault, self.started = name, logs / f"{slug}.log", "", time.perf_counter()
        self.about: dict[str, Any] | None = None
        """What it said of itself once it was ready."""
        self._num_errors, self._answered = 0, 0.0
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        with self.log_path.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(script), str(order)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log, text=True, start_new_session=True,  # an interrupt is the parent's to handle
            )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def is_alive(self) -> bool:
        """Whether it may be asked for anything."""
        return not self.fault

    def wait_ready(self, seconds: float) -> bool:
        """Wait until it has started; False where it hasn't yet.

        Raises:
            EngineFault: it died.
        """
        if self.about is None and self.is_alive:
            try:
                self.about = self._take(seconds)
            except queue.Empty:
                return False
            self.about["ready seconds"] = self._answered - self.started
        return self.about is not None

    def ask(self, seconds: float, **order: Any) -> dict[str, Any]:
        """Give an order and return the answer.

        Raises:
            EngineFault: it failed, or there is no answer within `seconds`: then the process is ended.
        """
        if self.fault:
            raise EngineFault(self.fault)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            answer = self._take(seconds)
        except BrokenPipeError:
            answer = self._take(_STACK_SECONDS)
        except queue.Empty:
            self.give_up(f"no answer within {seconds:.0f} s")
            raise EngineFault(self.fault) from None
        if "error" not in answer:
            self._num_errors = 0
            return answer
        self._num_errors += 1
        if self._num_errors == _MAX_ERRORS:
            self.give_up(f"{_MAX_ERRORS} errors in a row, the last: {answer['error']}")
        raise EngineFault(answer["error"])

    def give_up(self, reason: str) -> None:
        """End a process that is of no use any more, its stacks written to its log first."""
        self.fault = f"{reason}; its log ends: {self.read_log()}"
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGUSR1)
            time.sleep(_STACK_SECONDS)
        self.terminate()
        self.end()

    def terminate(self) -> None:
        """Ask it to end."""
        self._signal(signal.SIGTERM)

    def end(self, seconds: float = TERM_SECONDS) -> None:
        """Wait for its end, and kill it and what it started after `seconds`."""
        assert self._process.stdin is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=seconds)
        self._signal(signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it for a while
            self._process.wait(timeout=_KILL_SECONDS)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._reader.join(timeout=_KILL_SECONDS)

    def read_log(self) -> str:
        """Return the last lines of its log that say something."""
        lines = [line for line in self.log_path.read_text(errors="replace").splitlines() if line.strip()]
        return " / ".join(line.strip()[-_LINE_CHARS:] for line in lines[-_LOG_LINES:]) or "(empty)"

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _take(self, seconds: float) -> dict[str, Any]:
        answer = self._answers.get(timeout=max(0.01, seconds))
        if answer is None:
            code = self._process.wait()
            self.fault = f"ended with {code}; its log ends: {self.read_log()}"
            self.end()
            raise EngineFault(self.fault)
        return answer

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._answered = time.perf_counter()
                self._answers.put(json.loads(line))
        self._answers.put(None)
