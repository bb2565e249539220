"""The control service as a process of its own, as `sedac control` starts it: to be stopped, killed and started again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO


def make_environment(database: Path, **variables: str) -> dict[str, str]:
    """The environment of a control service on free ports, without the SEDAC_* variables of whoever runs the tests."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SEDAC_")}
    places = {"SEDAC_CONTROL_PORT": "0", "SEDAC_CONTROL_METRICS_PORT": "0", "SEDAC_CONTROL_DATABASE": str(database)}
    return clean | places | variables


def _read_to_end(stream: IO[str], lines: list[str]) -> None:
    with stream:
        lines.extend(stream)


class ControlProcess:
    """A service that outlives its processes: the database stays, and the port is a new one after each start unless it is fixed.

    A context manager that kills what runs in the end.
    """

    def __init__(self, database: Path, **variables: str) -> None:
        self._environment = make_environment(database, **variables)
        self.start()

    def __enter__(self) -> ControlProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()

    def start(self) -> None:
        """Start the process and wait until it listens; its address is taken from the start-up line."""
        command = [sys.executable, "-m", "sedac.app.cli", "control"]
        self.process = subprocess.Popen(command, env=self._environment, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self._log: list[str] = []
        for line in self.process.stderr:
            self._log.append(line)
            if found := re.search(r"control service on (\S+),", line):
                self.address = found[1]
                self._reader = threading.Thread(target=_read_to_end, args=(self.process.stderr, self._log), daemon=True)
                self._reader.start()  # a full pipe would stop it
                return
        raise AssertionError(f"the control service did not start: {''.join(self._log)[-2000:]}")

    def read_log(self) -> str:
        """Return what the last process wrote, once it has ended."""
        self._reader.join(10)
        return "".join(self._log)

    def kill(self) -> None:
        """End it as a crash does."""
        self.process.kill()
        self.process.wait(30)

    def kill_once(self, condition: Callable[[], bool]) -> threading.Thread:
        """End it as a crash does as soon as something is true; returns the thread that waits for that, or for the end of the process."""

        def wait() -> None:
            while not condition() and self.process.poll() is None:
                time.sleep(0.001)
            self.process.kill()

        killer = threading.Thread(target=wait)
        killer.start()
        return killer

    def restart(self) -> None:
        """Crash and start again on the same database."""
        self.kill()
        self.start()

    def freeze(self) -> None:
        """Let it hold its connections and do nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self.process.send_signal(signal.SIGCONT)
