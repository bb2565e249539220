"""Texts that the workshop reads: plain text, jsonl, chats, directories of those, and Hugging Face datasets by name.

Called by the commands through `commands.options.read_documents`. It reads whole files and never writes; nothing that it reads is run.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sedac.errors import ConfigError

from sedac_probes.corpus import Document

MIN_CHARS = 40
"""Least characters of a document. Shorter ones are left out."""
DATASET = "hf:"
"""Beginning of a source that is a Hugging Face dataset: hf:NAME[:SPLIT[:FIELD]]."""
_SUFFIXES = (".txt", ".jsonl")
_REMEDY = 'give each line an object with "text", with "messages" (a chat), or with "prompt" and "completion"'


@dataclass
class _Reader:
    """Turns sources into documents; loads the model's tokenizer when the first chat comes."""

    model: str
    _tokenizer: Any = None

    def read(self, source: str) -> Iterator[Document]:
        """Yield the documents of a file, of a directory's files in order of their names, or of a dataset.

        Raises:
            ConfigError: the directory has no texts, or a file is none.
        """
        if source.startswith(DATASET):
            yield from self._read_dataset(source)
        elif Path(source).is_dir():
            found = sorted(path for path in Path(source).rglob("*") if path.suffix in _SUFFIXES and path.is_file())
            if not found:
                raise ConfigError(f"{source} has no {' or '.join(_SUFFIXES)} files; name a directory of those, or the files themselves")
            for path in found:
                yield from self._read_file(path)
        else:
            yield from self._read_file(Path(source))

    def _read_file(self, path: Path) -> Iterator[Document]:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 (byte {error.start}: {error.reason}); convert it or leave it out") from error
        except OSError as error:
            raise ConfigError(f"{path} can't be read ({error.strerror}); name a readable file or directory") from error
        if not text.strip():
            raise ConfigError(f"{path} is empty; name a file with text or leave it out")
        if path.suffix != ".jsonl":
            yield Document(path=str(path), text=text)
            return
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield Document(path=f"{path}:{number}", text=self._read_line(f"{path}, line {number}", line))

    def _read_line(self, place: str, line: str) -> str:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{place} is not JSON ({error}); {_REMEDY}") from error
        return self.get_text(place, row)

    def get_text(self, place: str, row: Any, field: str = "") -> str:
        """Return the text of one row."""
        if not isinstance(row, Mapping):
            raise ConfigError(f"{place} is no object but {type(row).__name__}; {_REMEDY}")
        name = field or "text"
        if isinstance(row.get(name), str):
            return str(row[name])
        chat = row.get(field or "messages")
        if isinstance(chat, list):
            return self._render(place, chat)
        prompt, completion = row.get("prompt"), row.get("completion")
        if not field and isinstance(prompt, str) and isinstance(completion, str):
            return prompt + completion
        if not field and isinstance(prompt, list) and isinstance(completion, list):  # chats, as the trainers of Hugging Face take them
            return self._render(place, [*prompt, *completion])
        raise ConfigError(f"{place} has the fields {sorted(map(str, row))}, none is a text{f' {field!r}' if field else ''}; {_REMEDY}")

    def _render(self, place: str, messages: Sequence[Any]) -> str:
        good = all(isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages)
        if not messages or not good:
            raise ConfigError(f"{place}: a chat is a list of objects with a role and a text as content; mend the line or leave it out")
        tokenizer = self._get_tokenizer(place)
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # a template is a program of the model's own and refuses in its own ways
            raise ConfigError(f"{place}: the chat template of {self.model} refuses it ({error}); mend the line or leave it out") from error
        begin = tokenizer.bos_token or ""
        adds_begin = bool(begin) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        return text.removeprefix(begin) if adds_begin else text  # the tokenizer will begin it again

    def _get_tokenizer(self, place: str) -> Any:
        if self._tokenizer is None:
            if not self.model:
                raise ConfigError(f"{place} is a chat, which only a model's own template can render; this command takes texts without chats")
            from transformers import AutoTokenizer

            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self.model)
            except (OSError, ValueError) as error:
                raise ConfigError(f"--model {self.model} has no tokenizer that can be loaded; it is needed for the chat in {place}") from error
        if not self._tokenizer.chat_template:
            raise ConfigError(f"--model {self.model} has no chat template, {place} is a chat; give rendered texts instead")
        return self._tokenizer

    def _read_dataset(self, source: str) -> Iterator[Document]:
        name, split, field = [*source.removeprefix(DATASET).split(":"), "", ""][:3]
        try:
            load_dataset = importlib.import_module("datasets").load_dataset
        except ImportError as error:
            raise ConfigError(f"--dataset {name} needs the package datasets (pip install datasets); or name local files with --texts") from error
        split = split or "train"
        try:
            rows = load_dataset(name, split=split)
        except Exception as error:  # network, hub and dataset errors share no base
            first = str(error).partition("\n")[0]
            raise ConfigError(
                f"dataset {name!r}, split {split!r}, can't be loaded ({type(error).__name__}: {first}); name local files with --texts"
            ) from error
        for number, row in enumerate(rows):
            yield Document(path=f"{source}:{number}", text=self.get_text(f"dataset {name}, row {number}", row, field))


def read_texts(sources: Sequence[str], model: str = "") -> list[Document]:
    """Read all documents of files, directories and datasets, in the order named; `model` has the template for chats.

    A text file is one document, a line of a .jsonl file is one, and so is a row of a dataset. Documents of less than MIN_CHARS
    characters are left out.

    Raises:
        ConfigError: a source is missing, empty, malformed or not UTF-8 (named with its line), or all documents are too short.
    """
    reader = _Reader(model)
    documents = [document for source in sources for document in reader.read(source)]
    kept = [document for document in documents if len(document.text) >= MIN_CHARS]
    if not kept:
        longest = max((len(document.text) for document in documents), default=0)
        raise ConfigError(
            f"none of the {len(documents)} documents in {', '.join(sources)} has {MIN_CHARS} characters (longest: {longest}); name longer texts"
        )
    return kept
