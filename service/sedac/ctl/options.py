"""The options that commands of `sedac ctl` share, and how what is given there is read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from google.protobuf import json_format

from sedac.contract.v1 import control_pb2

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table; one line per event for watches.")]
Comment = Annotated[str, typer.Option(help="Why; kept with the revision.")]
Wait = Annotated[float, typer.Option(help="Seconds to wait until every engine runs the new revision; 0: don't wait.")]
DryRun = Annotated[bool, typer.Option(help="Check against the attached engines and change nothing.")]
Limit = Annotated[int, typer.Option(min=1, help="How many at most, newest first.")]


def merge_by_layer(option: str, values: dict[int, float], given: Sequence[str]) -> dict[int, float]:
    """Return `values` with the LAYER=VALUE and all=VALUE of an option put in."""
    merged = dict(values)
    for item in given:
        layer, _, value = item.partition("=")
        try:
            layers = list(merged) if layer == "all" else [int(layer)]
            merged |= dict.fromkeys(layers, float(value))
        except ValueError:
            raise typer.BadParameter(f"{option} {item!r}: give LAYER=VALUE or all=VALUE, such as 5=0.4") from None
    return merged


def parse_number_or(word: str, option: str, text: str) -> float | None:
    """Return an option's number; None where it is the word."""
    try:
        return None if text == word else float(text)
    except ValueError:
        raise typer.BadParameter(f"{option} {text!r}: give a number from 0 to 1, or {word}") from None


def read_policy_file(file: Path) -> control_pb2.Policy:
    """Read a policy as JSON; - is standard input."""
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        return json_format.Parse(text, control_pb2.Policy())
    except (OSError, UnicodeDecodeError, json_format.ParseError) as error:
        raise typer.BadParameter(f"{file} can't be read as a policy: {error}") from None
