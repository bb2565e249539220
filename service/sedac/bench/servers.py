"""Servers as process groups of their own: started, frozen while another is measured, thawed, and stopped whatever happens.

Nobody else's process is ever signalled. A frozen server is thawed before it is stopped, so that it can end by itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from sedac.bench.extras import need
from sedac.bench.plans import Plan
from sedac.errors import BenchmarkFailed
from sedac.policy.model import Policy

READY_SECONDS = 900.0
_STOP_SECONDS = 30.0
_LOG_LINES = 25


@dataclass
class Server:
    """A running process group."""

    plan: Plan
    log: Path
    process: subprocess.Popen[bytes]
    ready_seconds: float = 0.0
    is_frozen: bool = False
    knobs: dict[str, object] = field(default_factory=dict)
    """Knobs that a row has set, by path."""
    known: set[Any] = field(default_factory=set)
    """Its processes that were alive when they were last looked for."""
    first_policy: Policy | None = None
    """The policy that it started with. None until a row changes it."""

    @classmethod
    def start(cls, plan: Plan, log: Path) -> Server:
        """Start the processes; they may not be ready yet."""
        with log.open("wb") as output:
            process = subprocess.Popen(
                plan.command, env=plan.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        return cls(plan, log, process)

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.plan.port}"

    def wait_until_ready(self, timeout_seconds: float = READY_SECONDS) -> float:
        """Return the seconds until it answered, from now.

        Raises:
            BenchmarkFailed: it ended, or the time is up.
        """
        began = time.monotonic()
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
            except OSError:
                self.check()
                if time.monotonic() - began > timeout_seconds:
                    raise self._explain(f"was not ready after {timeout_seconds:.0f} s") from None
                time.sleep(0.1)
            else:
                self.ready_seconds = time.monotonic() - began
                return self.ready_seconds

    def check(self) -> None:
        """Do nothing while it runs.

        Raises:
            BenchmarkFailed: it ended.
        """
        if self.process.poll() is not None:
            raise self._explain(f"ended with code {self.process.returncode}")

    def _explain(self, what: str) -> BenchmarkFailed:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        return BenchmarkFailed(f"server {self.plan.name!r} {what}; its log is {self.log}, which ends with:\n" + "\n".join(lines))

    def freeze(self) -> None:
        """Stop all its processes where they are."""
        self._send(signal.SIGSTOP)
        self.is_frozen = True

    def thaw(self) -> None:
        """Let all its processes go on."""
        self._send(signal.SIGCONT)
        self.is_frozen = False

    def find_processes(self) -> list[Any]:
        """Return its living processes: those of its group, descendants that left it, and any that was seen before, each a `psutil.Process`."""
        psutil = need("psutil")
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(self.process.pid).children(recursive=True)
        for pid in psutil.pids():
            if _get_group(pid) == self.process.pid:
                with contextlib.suppress(psutil.NoSuchProcess):
                    found.append(psutil.Process(pid))
        self.known = {process for process in self.known | set(found) if _is_alive(process)}
        return sorted(self.known, key=lambda process: int(process.pid))

    def measure_memory(self) -> float:
        """Return its memory in bytes: proportional set sizes, in which a page shared by several processes counts once in all."""
        return float(sum(self._ask_each(lambda process: float(process.memory_full_info().pss))))

    def measure_cpu(self) -> float:
        """Return the seconds of processor time that its living processes have used so far."""
        return float(sum(self._ask_each(lambda process: float(sum(process.cpu_times()[:2])))))

    def _ask_each(self, ask: Callable[[Any], float]) -> list[float]:
        psutil = need("psutil")
        found = []
        for process in self.find_processes():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                found.append(ask(process))
        return found

    def _send(self, number: signal.Signals) -> None:
        processes = self.find_processes()
        outside = [process for process in processes if _get_group(process.pid) != self.process.pid]
        if len(outside) < len(processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)  # at once, so that none goes on while another stands
        for process in outside:
            with contextlib.suppress(need("psutil").NoSuchProcess):
                process.send_signal(number)

    def stop(self) -> None:
        """Thaw it, let it end, and kill what has not ended in time."""
        self.thaw()
        if self.process.poll() is None:
            self.process.terminate()
        deadline = time.monotonic() + _STOP_SECONDS
        while (self.process.poll() is None or self.find_processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        self._send(signal.SIGKILL)
        self.process.wait()
        need("psutil").wait_procs(self.find_processes(), timeout=_STOP_SECONDS)


def _is_alive(process: Any) -> bool:
    psutil = need("psutil")
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _get_group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return -1


class Servers:
    """All servers of a model, of which one at a time is thawed; leaving the context stops them."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._servers: dict[str, Server] = {}
        self._temporary = tempfile.TemporaryDirectory(prefix="sedac-bench-", ignore_cleanup_errors=True)
        logs.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def make_directory(self, name: str) -> Path:
        """Return a new directory for a server's own files, which is removed in the end."""
        return Path(tempfile.mkdtemp(prefix=f"{name}-".replace("/", "-").replace(" ", "-"), dir=self._temporary.name))

    def start(self, plan: Plan) -> Server:
        """Start a server while all others are frozen, and return it once it answers.

        Raises:
            BenchmarkFailed: it did not get ready.
        """
        self.use("")
        server = self.launch(plan)
        server.wait_until_ready()
        return server

    def launch(self, plan: Plan) -> Server:
        """Start a process group and return it at once; its log is named after it."""
        log = self._logs / ("".join(c if c.isalnum() else "-" for c in plan.name) + ".log")
        server = self._servers[plan.name] = Server.start(plan, log)
        return server

    def forget(self, server: Server) -> None:
        """Stop one and know it no more."""
        server.stop()
        del self._servers[server.plan.name]

    def use(self, name: str) -> Server | None:
        """Freeze all servers but one, which is thawed; an empty name: freeze them all.

        Raises:
            BenchmarkFailed: it is there no more.
        """
        for other in self._servers.values():
            if other.plan.name != name and not other.is_frozen:
                other.freeze()
        server = self._servers.get(name)
        if server is not None:
            server.check()
            if server.is_frozen:
                server.thaw()
        return server

    def get_all(self) -> Sequence[Server]:
        """Return the servers in the order in which they were started."""
        return list(self._servers.values())

    def stop(self) -> None:
        """Stop all servers; a signal meanwhile does not keep one from being stopped."""
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            stop_all(self._servers.values())
            self._servers.clear()
            self._temporary.cleanup()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def stop_all(servers: Iterable[Server]) -> None:
    """Thaw all servers and ask them to end, then wait for each."""
    alive = list(servers)
    for server in alive:
        server.thaw()
        if server.process.poll() is None:
            server.process.terminate()
    for server in alive:
        server.stop()
