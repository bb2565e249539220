"""Writes what was measured into a folder: results.json, report.md, speed.png, and report.html, which needs none of the others."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from sedac.bench.extras import need
from sedac.bench.picture import draw_speed
from sedac.bench.table import list_tables, make_table, to_markdown
from sedac.bench.words import describe, describe_setting

_HERE = Path(__file__).resolve().parent


def write_report(results: dict[str, Any], directory: Path) -> list[Path]:
    """Write every file of the report and return their paths.

    Raises:
        ConfigError: a package of the extra `bench` is missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (directory / "report.md").write_text(make_markdown(results), encoding="utf-8")
    draw_speed(results, directory / "speed.png")
    (directory / "report.html").write_text(make_page(results, (directory / "speed.png").read_bytes()), encoding="utf-8")
    return [directory / name for name in ("results.json", "report.md", "speed.png", "report.html")]


def show_tables(results: dict[str, Any], console: Console) -> None:
    """Print what the report says and its tables."""
    for title, rows in list_tables(results):
        console.print(make_table(title, rows))
    for sentence in describe(results):
        console.print(sentence, highlight=False, markup=False)


def make_markdown(results: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    head = [f"# {results['name']}", results["matrix"]["about"], describe_setting(results), "\n".join(f"- {s}" for s in describe(results))]
    tables = [to_markdown(title, rows) for title, rows in list_tables(results)]
    return "\n\n".join(part for part in [*head, "![speed against plain vLLM](speed.png)", *tables] if part)


def make_page(results: dict[str, Any], picture: bytes) -> str:
    """Return the report as one HTML file with everything in it."""
    jinja2, markupsafe = need("jinja2"), need("markupsafe")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["code"] = _make_code_filter(markupsafe.Markup)
    template = environment.from_string((_HERE / "report.html.j2").read_text(encoding="utf-8"))
    page: str = template.render(
        title=results["name"],
        about=results["matrix"]["about"],
        setting=describe_setting(results),
        sentences=describe(results),
        picture=base64.b64encode(picture).decode(),
        tables=[(title, rows[0], rows[1:]) for title, rows in list_tables(results)],
        command=f"sedac bench MATRIX.yaml --out DIR, matrix {results['digest']}",
        matrix=json.dumps(results["matrix"], indent=1),
    )
    return page


def _make_code_filter(markup: Any) -> Callable[[str], Any]:
    def mark_code(text: str) -> Any:
        """Escape a text and set what stands between backticks as code."""
        return markup("").join(markup("<code>{}</code>" if i % 2 else "{}").format(piece) for i, piece in enumerate(text.split("`")))

    return mark_code
