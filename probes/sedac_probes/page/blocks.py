"""What the report page is made of: sections of tables, facts, figures, notes and commands; and any JSON value as one of these.

Values are put in as they are: the template escapes them, but for markup that `charts` made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from sedac_probes.page import charts

_MOST_ITEMS, _MOST_ROWS, _MOST_CHARS, _DEPTH = 24, 400, 300, 3
_MOST = 1e15
_DIGEST_CHARS = 64
_NUMBER = re.compile(r"-?[0-9][0-9,.e+-]*%?|no number")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells; a cell is text or markup."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str | Markup, ...], ...]
    caption: str = ""
    marked: frozenset[int] = frozenset()
    """Numbers of the rows to stand out."""
    kind: str = "table"

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns hold numbers, and are set flush right."""
        cells = [[row[i] for row in self.rows if row[i] != "-"] for i in range(len(self.columns))]
        return tuple(bool(column) and all(not isinstance(c, Markup) and _NUMBER.fullmatch(c) for c in column) for column in cells)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Names and values."""

    rows: tuple[tuple[str, str | Markup], ...]
    kind: str = "facts"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A chart or a picture, with its caption and the names of its series."""

    markup: Markup
    caption: str
    legend: tuple[str, ...] = ()
    kind: str = "figure"

    @property
    def keys(self) -> list[tuple[Markup, str]]:
        """Marker and name of every series."""
        return [(charts.draw_key(i), name) for i, name in enumerate(self.legend)]


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Shares of 0 to 1, one row per name and one column per layer."""

    rows: tuple[tuple[str, tuple[float, ...]], ...]
    caption: str
    most: float = 1.0
    """The share that is drawn at full strength."""
    kind: str = "heat"


@dataclass(frozen=True, kw_only=True)
class Text:
    """A paragraph; `note` sets it apart."""

    text: str
    kind: str = "text"


@dataclass(frozen=True, kw_only=True)
class Commands:
    """Commands to type, each with what it is for."""

    rows: tuple[tuple[str, str], ...]
    kind: str = "commands"


@dataclass(frozen=True, kw_only=True)
class Details:
    """Blocks that are folded away."""

    title: str
    blocks: tuple[Any, ...]
    kind: str = "details"


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page."""

    name: str
    title: str
    blocks: tuple[Any, ...]


@dataclass
class Part:
    """One JSON file; what is never taken from it is shown as it is at the end of its section."""

    name: str
    data: dict[str, Any]
    taken: set[str] = field(default_factory=lambda: {"kind"})

    def take(self, key: str) -> Any:
        """Return a field, or None."""
        self.taken.add(key)
        return self.data.get(key)

    def get_rest(self) -> tuple[Details, ...]:
        """Return what was not taken, folded."""
        rest = {key: value for key, value in self.data.items() if key not in self.taken}
        return (Details(title=f"Other fields of {self.name}", blocks=tuple(describe(rest))),) if rest else ()


def as_number(value: Any) -> float | None:
    """Return a number that a chart can show, or None where it is anything else."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MOST else None


def as_list(value: Any) -> list[Any]:
    """Return a list, or an empty one."""
    return value if isinstance(value, list) else []


def as_rows(value: Any) -> list[dict[str, Any]]:
    """Return the mappings of a list, or none."""
    return [row for row in as_list(value) if isinstance(row, dict)]


def as_dict(value: Any) -> dict[str, Any]:
    """Return a mapping, or an empty one."""
    return value if isinstance(value, dict) else {}


def as_percent(value: Any, digits: int = 1) -> str:
    """Format a share."""
    number = as_number(value)
    return "-" if number is None else f"{number:.{digits}%}"


def as_figure(value: Any, form: str = ".4f") -> str:
    """Format a number, or say - for what is none."""
    number = as_number(value)
    return "-" if number is None else format(number, form)


def as_text(value: Any) -> str | Markup:
    """Format a scalar for people; a sha256 in a form that can be copied and breaks."""
    if isinstance(value, str) and len(value) == _DIGEST_CHARS and set(value) <= set("0123456789abcdef"):
        return Markup('<code class="digest">{}</code>').format(value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list | tuple) and not any(isinstance(v, list | tuple | dict) for v in value):
        shown = ", ".join(str(as_text(v)) if isinstance(v, float) else str(v) for v in value[:_MOST_ITEMS])
        return shown + (f" … {len(value)} in all" if len(value) > _MOST_ITEMS else "")
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= _MOST_CHARS else text[:_MOST_CHARS] + " …"


def as_title(key: object) -> str:
    """Turn a field's name into words."""
    return str(key).replace("_", " ")


def mark_code(text: str) -> Markup:
    """Escape a text and set what stands between backticks as code."""
    pieces = [Markup("<code>{}</code>" if i % 2 else "{}").format(piece) for i, piece in enumerate(str(text).split("`"))]
    return Markup("").join(pieces)


def make_table(rows: Sequence[Mapping[str, Any]], caption: str = "", columns: Sequence[str] = ()) -> Table:
    """Make a table of mappings: one column per field, in order of appearance."""
    names = list(columns) or list(dict.fromkeys(key for row in rows for key in row))
    cells = tuple(tuple(as_text(row[name]) if name in row else "-" for name in names) for row in rows[:_MOST_ROWS])
    return Table(columns=tuple(map(as_title, names)), rows=cells, caption=caption)


def describe(value: Any, title: str = "", depth: int = _DEPTH) -> Iterator[Any]:
    """Yield blocks that show any JSON value."""
    if isinstance(value, dict):
        nested = {k: v for k, v in value.items() if (isinstance(v, dict) and v) or as_rows(v)}
        plain = {k: v for k, v in value.items() if k not in nested}
        if title and (plain or not nested):
            yield Text(text=title, kind="label")
        if plain:
            yield Facts(rows=tuple((as_title(k), as_text(v)) for k, v in plain.items()))
        for key, part in nested.items():
            name = f"{title}, {as_title(key)}" if title else as_title(key)
            if depth:
                yield from describe(part, name, depth - 1)
            else:
                yield Facts(rows=((name, as_text(part)),))
    elif rows := as_rows(value):
        yield make_table(rows, title)
    else:
        yield Facts(rows=((title or "value", as_text(value)),))
