"""The control service as a process of its own, as `sedac control` starts it: to be stopped, killed and started again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import TextIO


def make_environment(database: Path, **variables: str) -> dict[str, str]:
    """The environment of a control service on free ports, without the SEDAC_* variables of whoever runs the tests."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SEDAC_")}
    places = {"SEDAC_CONTROL_PORT": "0", "SEDAC_CONTROL_METRICS_PORT": "0", "SEDAC_CONTROL_DATABASE": str(database)}
    return clean | places | variables


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
        lines: list[str] = []
        for line in self.process.stderr:
            lines.append(line)
            if found := re.search(r"control service on (\S+),", line):
                self.address = found[1]
                threading.Thread(target=_drain, args=(self.process.stderr,), daemon=True).start()  # a full pipe would stop it
                return
        raise AssertionError(f"the control service did not start: {''.join(lines)[-2000:]}")

    def kill(self) -> None:
        """End it as a crash does."""
        self.process.kill()
        self.process.wait(30)

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


def _drain(stream: TextIO) -> None:
    with stream:
        while stream.read(1 << 16):
            pass
