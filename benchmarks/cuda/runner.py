"""Runs rows one by one in a child process and writes each down as soon as it is there; what fails, crashes or hangs is told and passed over.

The parent never touches the device: it plans, waits, writes OUT.jsonl row by row, and OUT.json and OUT.md from it at the end, on an
interrupt too. A row is not begun once its time is up; those left out are named.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import table

CHILD = (sys.executable, str(Path(__file__).with_name("child.py")))
START_SECONDS = 180.0
"""A child may take so many seconds to import torch and to reach the device."""
PREPARATION_SECONDS = 150.0
"""A row which the others rest on may take so many seconds, since a compiler may run."""
GRACE_SECONDS = 15.0
"""Seconds that the last row may run past the end of the whole."""
MAX_HANGS = 2
"""rows of one part and number of tokens that may end with a lost child before the others of their kind are left out"""
CEILINGS = ("bytes per second", "flops per second")
NO_GPU = (
    "no GPU here: timings need an NVIDIA GPU of compute capability 8.0 or newer, a CUDA build of torch (CUDA 12.4 or newer) and Triton; "
    "--check runs the correctness part without one"
)
Row = dict[str, Any]


class Interrupted(Exception):
    """SIGINT or SIGTERM came; its number is the argument."""


class Runner:
    """One run of a benchmark; `with` gives interrupts back and ends the child."""

    def __init__(
        self, out: Path | None, *, is_check: bool, seconds: float = math.inf, row_seconds: float = 60.0, rounds: int = 15,
        is_eager: bool = False, command: Sequence[str] = CHILD,
    ) -> None:  # fmt: skip
        """`seconds`: of the whole, from now on; `row_seconds`: of one row, making its weights and compiling its kernels among them.

        `is_eager`: capture nothing, so that times have the host's own among them.
        """
        self.out, self.is_check, self.row_seconds, self.command = out, is_check, row_seconds, tuple(command)
        self.context: dict[str, Any] = {"is_check": is_check, "captures": not (is_check or is_eager), "rounds": rounds}
        self.rows: list[Row] = []
        self.pending: list[Row] = []
        """Rows of those given to `run` last that are not done. At an interrupt the one that ran is among them."""
        self.left_out: list[Row] = []
        self.is_interrupted = False
        self._start = time.monotonic()
        self.end = seconds
        self._child: subprocess.Popen[str] | None = None
        self._answers = -1
        self._buffer = b""
        self._losses: Counter[tuple[Any, ...]] = Counter()
        self._handlers: dict[int, Any] = {}
        self._signal = 0
        """Signal that came and was not told yet. It ends the wait for a row at once, and nothing else in its middle."""
        self._is_waiting = False
        self._lines = self._log = None
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            self._lines, self._log = out.with_suffix(".jsonl").open("w"), out.with_suffix(".log").open("w")

    def __enter__(self) -> Runner:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._kill()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        for file in (self._lines, self._log):
            if file is not None:
                file.close()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def run(self, specs: Sequence[Row], *, until: float = math.inf) -> list[Row]:
        """Run these rows until so many seconds after the start; return those that were not begun.

        Raises:
            Interrupted: the rows so far are written.
            SystemExit: no child comes up.
        """
        until, self.pending = min(until, self.end), list(specs)
        while self.pending:
            if self._signal:
                raise Interrupted(self._signal)
            if self.elapsed >= until:
                break
            spec = self.pending[0]
            kind = (spec["part"], spec.get("tokens"))
            if self._losses[kind] >= MAX_HANGS:
                self._keep(spec | {"failed": f"not begun: {MAX_HANGS} rows like it ended with the process or its limit"})
            else:
                began = time.monotonic()
                row = self._ask(spec, min(self.row_seconds, self.end + GRACE_SECONDS - self.elapsed))
                self._losses[kind] += row.pop("lost", 0)
                self._keep(spec | row | {"seconds": round(time.monotonic() - began, 2)})
            self.pending.pop(0)
        return self.pending

    def prepare(self, specs: Sequence[Row]) -> None:
        """Run the rows that the others rest on: take over the card's ceilings, and launch eagerly where graphs can't hold IF nodes.

        Raises:
            SystemExit: there is no GPU, and this is no check.
        """
        usual, self.row_seconds = self.row_seconds, max(self.row_seconds, PREPARATION_SECONDS)
        self.run(specs)
        self.row_seconds = usual
        for row in self.rows:
            if row["part"] == "card":
                if not row.get("gpu") and not self.is_check and "failed" not in row:
                    raise SystemExit(NO_GPU)
                self.context |= {name: row[name] for name in CEILINGS if name in row}
            if row["part"] == "nodes" and self.context["captures"]:
                problem = row.get("failed") or row.get("if nodes")
                self.context["captures"] = not problem
                if problem:
                    print(f"IF nodes don't work here ({problem}); all that follows is launched eagerly, the host's own time among it", flush=True)

    def _keep(self, row: Row) -> None:
        self.rows.append(row)
        if self._lines is not None:
            self._lines.write(json.dumps(row) + "\n")
            self._lines.flush()
            os.fsync(self._lines.fileno())
        columns = table.COLUMNS[row["part"]]
        print(table.format_row(columns, row), flush=True)
        if "failed" in row:
            print(f"  failed: {row['failed']}", flush=True)

    def _ask(self, spec: Row, limit: float) -> Row:
        """Return a row's fields from the child; `lost`: the child is gone."""
        if self._child is None or self._child.poll() is not None:
            self._begin_child()
        assert self._child is not None
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended between two rows; what it left to read says so below
            self._child.stdin.write(json.dumps({"spec": spec, "context": self.context}) + "\n")
            self._child.stdin.flush()
        answer = self._read(limit)
        if answer is not None:
            return answer
        code = self._child.poll()
        if code is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._child.wait(timeout=0.5)
        self._kill()
        what = f"took longer than {limit:.0f} s" if code is None else f"the process ended with {_name(code)}"
        return {"failed": what, "lost": 1}

    def _begin_child(self) -> None:
        self._kill()
        read, write = os.pipe()
        arguments = [*self.command, str(write), *(["--interpreted"] if self.is_check else [])]
        log = self._log or None
        self._child = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=log or subprocess.DEVNULL, stderr=log, pass_fds=(write,), text=True,
            process_group=0,  # a terminal's interrupt is the parent's to answer
        )  # fmt: skip
        os.close(write)
        self._answers, self._buffer = read, b""
        if self._read(START_SECONDS) is None:
            code = self._child.poll()
            self._kill()
            raise SystemExit(f"no process for the rows comes up ({_name(code)}); see {self.out.with_suffix('.log') if self.out else 'above'}")

    def _read(self, limit: float) -> Row | None:
        """Return the child's next answer; None: its end came first, or the limit (in seconds)."""
        end = time.monotonic() + limit
        while b"\n" not in self._buffer:
            self._is_waiting = True
            try:
                if self._signal:
                    raise Interrupted(self._signal)
                ready, _, _ = select.select([self._answers], [], [], max(0.0, end - time.monotonic()))
            finally:
                self._is_waiting = False
            chunk = os.read(self._answers, 1 << 16) if ready else b""
            if not chunk:
                return None
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: Row = json.loads(line)
        return answer

    def _kill(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            assert self._child.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._child.stdin.close()
            os.close(self._answers)
        self._child = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        if self._is_waiting:
            raise Interrupted(number)

    def note_interrupt(self, error: Interrupted) -> None:
        """Say that it came."""
        self.is_interrupted = True
        print(f"interrupted by {signal.Signals(error.args[0]).name}", flush=True)

    def write(self) -> None:
        """Write OUT.json and OUT.md from the rows so far."""
        if self.out is None:
            return
        told = {"seconds": round(self.elapsed, 1), "interrupted": self.is_interrupted, "captures": self.context["captures"]}
        table.write(self.out, self.rows, **told, failed=self.num_failed, left_out=self.left_out)

    @property
    def num_failed(self) -> int:
        """Rows that failed."""
        return sum("failed" in row for row in self.rows)

    def finish(self, left_out: Sequence[Row]) -> int:
        """Write the files, tell what failed and what was left out, and return the exit status: 1 where a row failed, 130 after an interrupt."""
        self.left_out = list(left_out)
        self.write()
        print(f"\n{len(self.rows)} rows in {self.elapsed:.0f} s, {self.num_failed} failed, {len(left_out)} left out", flush=True)
        for row in self.rows:
            if "failed" in row:
                print(f"  failed: {table.describe(row)}: {row['failed']}", flush=True)
        for spec in left_out:
            print(f"  left out: {table.describe(spec)}", flush=True)
        return 130 if self.is_interrupted else int(self.num_failed > 0)


def _name(code: int | None) -> str:
    if code is None:
        return "no answer"
    return f"status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
