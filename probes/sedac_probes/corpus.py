"""The demo corpus: the CPython standard library's own sources, split by file.

Called by the demo model's recipe, by the probe pipeline's defaults, by tests and by benchmarks, so that all of them
agree on what was held out. It never downloads anything and never writes.

A file is held out by a hash of its path, so the split is the same for every patch release of Python. The standard library
contains near-duplicates across files (generated tables, similar tests): splitting by file does not remove those.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "heldout"]

HELDOUT_PERCENT = 5
_MIN_CHARS = 200
_SKIPPED_PARTS = frozenset({"site-packages", "dist-packages", "__pycache__", "lib2to3"})


@dataclass(frozen=True, kw_only=True)
class Document:
    """One source file: its path relative to the library's root, and its text."""

    path: str
    text: str


def is_heldout(relative_path: str) -> bool:
    """Tell whether the file at `relative_path` (POSIX form) belongs to the held-out 5 %."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELDOUT_PERCENT


def read_stdlib(split: Split, root: Path | None = None) -> list[Document]:
    """Read all Python sources of one side of the split, sorted by path.

    `root` defaults to the running interpreter's standard library. Files that are not UTF-8 or shorter than 200
    characters are left out.

    Raises:
        ValueError: nothing was found under `root`.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_PARTS.intersection(relative.parts) or is_heldout(relative.as_posix()) != (split == "heldout"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # test files with deliberate encodings; the tokenizer reads UTF-8 only
        if len(text) >= _MIN_CHARS:
            documents.append(Document(path=relative.as_posix(), text=text))
    if not documents:
        raise ValueError(f"no Python sources under {root}: name the root of a CPython standard library")
    return documents


def digest(documents: list[Document]) -> str:
    """Return a sha256 over paths and texts, to name the data in cards and manifests."""
    total = hashlib.sha256()
    for document in documents:
        total.update(document.path.encode() + b"\0" + document.text.encode() + b"\0")
    return total.hexdigest()


def cut_prompts(documents: list[Document], *, num_prompts: int, num_chars: int) -> list[str]:
    """Cut `num_prompts` prompts of about `num_chars` characters at line starts, spread over the documents.

    Raises:
        ValueError: the documents are too few for that many prompts.
    """
    prompts: list[str] = []
    for depth in range(64):
        for document in documents:
            start = document.text.find("\n", depth * 3 * num_chars) + 1
            piece = document.text[start : start + num_chars]
            if (start > 0 or depth == 0) and len(piece) == num_chars:
                prompts.append(piece)
            if len(prompts) == num_prompts:
                return prompts
    raise ValueError(f"only {len(prompts)} prompts of {num_chars} characters in {len(documents)} documents, {num_prompts} wanted")
