"""Hooks of mkdocs (see mkdocs.yml): what lies outside docs/ and is linked from it.

Pictures are taken into the site. Other files of the repository are linked where pyproject.toml names the repository; where it names none,
the link's text stays without the link.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

_ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(((?:\.\./)+)([^)\s#]+)(#[^)\s]*)?\)")
_PICTURES = "pictures"


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures of the benchmarks."""
    for path in sorted((_ROOT / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, f"{_PICTURES}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links that leave docs/ into links that a site can have."""
    depth = page.file.src_uri.count("/")

    def replace(match: re.Match[str]) -> str:
        mark, text, up, path, fragment = match.groups()
        if up.count("../") != depth + 1:
            return match[0]  # stays inside docs/
        if mark:
            return f"![{text}]({'../' * depth}{_PICTURES}/{Path(path).name})"
        repository = _find_repository()
        return f"[{text}]({repository}/blob/main/{path}{fragment or ''})" if repository else text

    return _LINK.sub(replace, markdown)


def _find_repository() -> str:
    urls = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"].get("urls", {})
    found = {name.lower(): url.rstrip("/") for name, url in urls.items()}
    return next((found[name] for name in ("repository", "source", "source code", "homepage") if name in found), "")
