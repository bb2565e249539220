"""What is asked: prompts of a fixed number of tokens, cut from texts that neither the model nor the probes have seen.

Requests carry token ids, so that every server gets the same tokens and none spends time on the tokenizer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sedac.bench.extras import need
from sedac.bench.matrix import HELDOUT
from sedac.errors import ConfigError


def read_texts(source: str) -> list[str]:
    """Read the texts of a prompt source.

    Raises:
        ConfigError: there is no such source, or nothing in it.
    """
    path = Path(source)
    if source == HELDOUT:
        corpus = need("sedac_probes.corpus")
        texts = [document.text for document in corpus.read_stdlib("heldout")]
    elif path.is_dir():
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in sorted(path.rglob("*.py"))]
    elif path.is_file():
        content = path.read_text(encoding="utf-8")
        texts = _read_lines(path, content) if path.suffix == ".jsonl" else [content]
    else:
        raise ConfigError(f"prompts {source!r} is neither a file nor a directory; give one of these, or `{HELDOUT}`")
    if not any(texts):
        raise ConfigError(f"prompts {source!r} holds no text; give a text file, a .jsonl file, or a directory of .py files")
    return texts


def _read_lines(path: Path, content: str) -> list[str]:
    texts = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            found = json.loads(line) if line.strip() else {"text": ""}
            texts.append(str(found["prompt"] if "prompt" in found else found["text"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f'{path}:{number} is no prompt ({error!r}); give one JSON object a line with "prompt" or "text"') from error
    return texts


class Prompts:
    """Prompts of one model; each is given out once before any is given out again."""

    def __init__(self, source: str, model: Path, *, seed: int = 0) -> None:
        tokenize = _load_tokenizer(model)
        self._texts = [tokenize(text) for text in read_texts(source)]
        self._source = source
        random.Random(seed).shuffle(self._texts)
        self._pieces: dict[int, list[list[int]]] = {}
        self._given = 0

    def take(self, count: int, num_tokens: int, first: int = 0) -> list[list[int]]:
        """Return `count` prompts of `num_tokens` tokens, from number `first` on.

        Raises:
            ConfigError: no text is that long.
        """
        pieces = self._pieces.get(num_tokens) or self._cut(num_tokens)
        return [pieces[(first + number) % len(pieces)] for number in range(count)]

    def _cut(self, num_tokens: int) -> list[list[int]]:
        longest = max(map(len, self._texts))
        pieces = [
            text[start : start + num_tokens]
            for start in range(0, longest, num_tokens)
            for text in self._texts
            if len(text) >= start + num_tokens
        ]  # fmt: skip
        if not pieces:
            limit = f"the longest text of {self._source!r} has {longest} tokens"
            raise ConfigError(f"prompts of {num_tokens} tokens are wanted, and {limit}; give longer texts, or fewer tokens")
        self._pieces[num_tokens] = pieces
        return pieces


def _load_tokenizer(model: Path) -> Any:
    file = model / "tokenizer.json"
    if file.is_file():
        tokenizer = need("tokenizers").Tokenizer.from_file(str(file))
        return lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    try:
        loaded = need("transformers").AutoTokenizer.from_pretrained(str(model))
    except (OSError, ValueError) as error:
        raise ConfigError(f"the tokenizer of {model} can't be read: {error}; give a directory with tokenizer.json") from error
    return lambda text: loaded(text, add_special_tokens=False)["input_ids"]


def make_starts(loads: Sequence[int], rounds: int) -> list[list[int]]:
    """Return the number of the first prompt of each cell by round and load, so that no two cells of a run begin with the same prompts."""
    starts, place = [], 0
    for _ in range(rounds):
        row = []
        for size in loads:
            row.append(place)
            place += size
        starts.append(row)
    return starts
