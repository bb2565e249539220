"""Requests for certification, cut from documents: prompts of one length, spread over the documents and in random order.

Called by `certify`. Losses of requests from one document are not independent of one another, so a document gives a second request
only after every document has given one.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sedac.errors import ConfigError

from sedac_probes.corpus import Document

_CHARS_PER_TOKEN = 8  # more than tokenizers need on average, so that a piece seldom is too short


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and where it is from."""

    document: str
    place: int
    """Position of the first character in the document."""
    prompt: list[int]
    """Token ids of the prompt."""


def cut_requests(documents: Sequence[Document], tokenizer: Any, *, num_requests: int, num_tokens: int, seed: int) -> list[Request]:
    """Cut prompts of `num_tokens` tokens that begin at line starts; which places and in which order follows from `seed`.

    Raises:
        ConfigError: the documents are too few or too short for that many.
    """
    order = sorted(documents, key=lambda d: d.path)
    random.Random(seed).shuffle(order)
    sources = [_cut(document, tokenizer, num_tokens, seed) for document in order]
    requests: list[Request] = []
    while sources and len(requests) < num_requests:  # a round: one request of every document that has another
        taken = [next(source, None) for source in sources]
        sources = [source for source, request in zip(sources, taken, strict=True) if request]
        requests += [request for request in taken if request]
    if len(requests) < num_requests:
        raise ConfigError(
            f"{len(documents)} documents give {len(requests)} prompts of {num_tokens} tokens, {num_requests} wanted; "
            "name more or longer texts, or lower --requests or --prompt-tokens"
        )
    return requests[:num_requests]


def _cut(document: Document, tokenizer: Any, num_tokens: int, seed: int) -> Iterator[Request]:
    size = num_tokens * _CHARS_PER_TOKEN
    places = list(range(0, max(1, len(document.text) - size), size))
    random.Random(f"{seed}:{document.path}").shuffle(places)
    for place in places:
        start = document.text.find("\n", place) + 1 if place else 0
        if start - place > size // 2 or (place and not start):
            continue  # one long line: the piece would run into the next place's
        prompt = tokenizer(document.text[start : start + size])["input_ids"][:num_tokens]
        if len(prompt) == num_tokens:
            yield Request(document=document.path, place=start, prompt=list(prompt))


def get_digest(requests: Sequence[Request]) -> str:
    """Return the sha256 of the prompts in their order, to name the data in certificates."""
    return hashlib.sha256(json.dumps([r.prompt for r in requests], separators=(",", ":")).encode()).hexdigest()
