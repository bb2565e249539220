"""Reads README.md, CONTRIBUTING.md and the pages of docs/: their headings, links and fenced blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: str
    heading: str
    """under which it stands"""
    number: int
    """among the blocks under this heading, from 0"""
    language: str
    text: str

    @property
    def key(self) -> tuple[str, str]:
        return self.page, self.heading

    def __str__(self) -> str:
        return f"{self.page}, {self.heading!r}, block {self.number}"


def list_pages() -> list[str]:
    """The pages that people read, by their paths in the repository."""
    return ["README.md", "CONTRIBUTING.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md")))]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def read_blocks(page: str) -> list[Block]:
    text, found, numbers = read(page), [], {}
    outside = _FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)  # a comment in a block is no heading
    assert "```" not in outside, f"{page}: a fence is not closed"
    places = [(outside.count("\n", 0, match.start()), match[1]) for match in _HEADING.finditer(outside)]
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start())
        heading = [title for at, title in places if at < line][-1]
        number = numbers[heading] = numbers.get(heading, -1) + 1
        found.append(Block(page, heading, number, match[1], match[2]))
    return found


def list_blocks() -> list[Block]:
    return [block for page in list_pages() for block in read_blocks(page)]


def read_anchors(page: str) -> set[str]:
    """The fragments under which a page's headings can be linked."""
    return {_slug(title) for title in _HEADING.findall(_FENCE.sub("", read(page)))}


def _slug(title: str) -> str:
    plain = re.sub(r"[^\w\s-]", "", title.lower())
    return re.sub(r"\s+", "-", plain.strip())


def read_links(page: str) -> Iterator[str]:
    yield from _LINK.findall(_FENCE.sub("", read(page)))
