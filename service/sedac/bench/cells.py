"""What is measured already: one JSON object a line in DIR/cells.jsonl, so that a run that was broken off goes on where it was.

The first line says which matrix the figures are of, under which versions and on which machine; a folder never holds those of two.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sedac.errors import ConfigError

Key = tuple[str, str, str, int]
"""Model, row, load and round."""


class Cells:
    """The file of one run."""

    def __init__(self, directory: Path, header: dict[str, Any]) -> None:
        """Open the file, or begin it.

        Raises:
            ConfigError: the folder holds figures of another matrix, of other versions or of another mode.
        """
        self.path = directory / "cells.jsonl"
        directory.mkdir(parents=True, exist_ok=True)
        lines = list(read_lines(self.path))
        if not lines:
            self._append({"kind": "header", **header})
            lines = [{"kind": "header", **header}]
        self.header, self._lines = lines[0], lines[1:]
        self._check(directory, header)
        self.session = 1 + max((int(line["session"]) for line in self._lines if "session" in line), default=-1)
        """Number of this run. A folder that was measured at one go has only 0."""

    def _check(self, directory: Path, header: dict[str, Any]) -> None:
        for what in ("digest", "mode", "versions"):
            if self.header[what] != header[what]:
                held, asked = (f"matrix {h['name']!r} ({what} {_show(h[what])})" for h in (self.header, header))
                raise ConfigError(f"{directory} holds figures of {held}, asked for is {asked}; give another --out, or remove that folder")

    def add(self, kind: str, **fields: Any) -> None:
        """Keep a figure; it is on the disk when this returns."""
        line = {"kind": kind, "session": self.session, **fields}
        self._append(line)
        self._lines.append(line)

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def get_all(self, kind: str, **fields: Any) -> list[dict[str, Any]]:
        """Return what is kept of a kind with these fields, in the order in which it came."""
        return [line for line in self._lines if line["kind"] == kind and all(line.get(name) == value for name, value in fields.items())]

    def get_done(self) -> set[Key]:
        """Return the cells that are measured."""
        return {(line["model"], line["row"], line["load"], line["round"]) for line in self.get_all("cell")}


def _show(value: Any) -> str:
    return ", ".join(f"{name} {version}" for name, version in value.items()) if isinstance(value, dict) else str(value)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file, none if there is no file; a last line that was broken off is cut away.

    Raises:
        ConfigError: another line is broken.
    """
    if not path.exists():
        return
    whole = 0
    data = path.read_bytes()
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        try:
            found = json.loads(line)
            if not line.endswith(b"\n"):
                raise ValueError("it has no end")
        except ValueError as error:
            if whole + len(line) < len(data):
                raise ConfigError(f"{path}:{number} is broken ({error}); remove that line, or give another --out") from error
            os.truncate(path, whole)
            return
        whole += len(line)
        yield found
