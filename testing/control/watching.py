"""Watching commands of `sedac ctl`, run as a user runs them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

from testing.control.running import RunningServer


@contextlib.contextmanager
def watching(server: RunningServer, *command: str) -> Iterator[Iterator[str]]:
    """Run a watching command as a user does; yields its lines as they come, then stops it by Ctrl-C, after which it must end in peace."""
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from sedac.app.cli import main; main()"  # else ignored in a job
    env = {**os.environ, "SEDAC_CONTROL_ADDRESS": server.address, "COLUMNS": "250"}
    process = subprocess.Popen([sys.executable, "-c", code, "ctl", *command], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    too_late = threading.Timer(60, process.kill)
    too_late.start()
    try:
        assert process.stdout
        yield iter(process.stdout.readline, "")
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=30)[1]
        assert (process.returncode, errors) == (0, "")
    finally:
        too_late.cancel()
        process.kill()
        process.communicate()
