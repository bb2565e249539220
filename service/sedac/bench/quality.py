"""Quality of every row beside plain vLLM, over HTTP and one request at a time.

Agreement: the same prompts are answered greedily by plain vLLM and by the row. Reported are the share of answers that are the same to the
last token, and the mean share of an answer's tokens before the first that differs. In bf16 rounding alone makes answers part sooner or
later, so an exact row need not reach 1.

Perplexity ratio: the exponential of what held-out text loses per token, in nats, when the row reads it in place of plain vLLM. A server
tells log-probabilities of a text's tokens only as those of a prompt, which SEDAC computes in full while the policy's `phase` is `decode`.
So for this figure alone the policy's phase is set to `all` and `strict` is on: every token of the text is then reduced as a generated one
may be at most, with the true text as its past (teacher forcing). Plain vLLM's ratio is 1 by definition.
"""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from sedac.bench.load import Ask, ask_one
from sedac.bench.matrix import PLAIN, Quality, Row
from sedac.bench.servers import Server
from sedac.bench.stage import Stage
from sedac.bench.tuning import set_knobs
from sedac.errors import BenchmarkFailed

_PLACE = 1_000_003
"""Number of the first prompt, far from those of the rounds."""


def measure(stage: Stage, how: Quality) -> None:
    """Measure the rows that are missing; plain vLLM's answers are kept with the cells, for runs that go on."""
    for row in stage.rows:
        if stage.cells.get_all("quality", model=stage.model.name, row=row.name):
            continue
        stage.step(f"{stage.model.name}: quality, {row.name}")
        answers, loss = _answer(stage, how, row), _read(stage, how, row)
        stage.cells.add("quality", model=stage.model.name, row=row.name, answers=answers, loss=loss)


def _answer(stage: Stage, how: Quality, row: Row) -> list[list[int]]:
    server = stage.prepare(row)
    prompts = stage.prompts.take(how.requests, stage.matrix.prompt_tokens, _PLACE)
    num_tokens = min(how.output_tokens, stage.model.max_model_len - stage.matrix.prompt_tokens)
    ask = Ask(url=server.url, tier=row.tier.name, num_tokens=num_tokens, salt=f"quality {row.name}")
    return [ask_one(ask, prompt).token_ids for prompt in prompts]


def _read(stage: Stage, how: Quality, row: Row) -> float | None:
    """Return the mean negative log-probability of the texts' tokens, in nats."""
    if not how.texts:
        return None
    server = stage.prepare(row)
    if row.system.kind == "sedac":
        set_knobs(server, {**row.tier.knobs, "phase": "all", "strict": True})
    texts = stage.prompts.take(how.texts, min(how.text_tokens, stage.model.max_model_len - 1), _PLACE)
    ask = Ask(url=server.url, tier=row.tier.name, num_tokens=1, salt=f"text {row.name}")
    losses = [loss for text in texts for loss in score(server, ask, text)]
    return sum(losses) / len(losses)


def score(server: Server, ask: Ask, text: Sequence[int]) -> list[float]:
    """Return the negative log-probability of each token of a text but the first, in nats.

    Raises:
        BenchmarkFailed: the server refused.
    """
    body: dict[str, Any] = {**ask.make_body(text), "stream": False, "prompt_logprobs": 0}
    del body["stream_options"]
    request = urllib.request.Request(f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            places = json.load(answer)["choices"][0]["prompt_logprobs"]
    except urllib.error.HTTPError as error:
        raise BenchmarkFailed(f"server {server.plan.name!r} did not score a text: {error.read().decode(errors='replace')[:500]}") from error
    return [-place[str(token)]["logprob"] for token, place in zip(text[1:], places[1:], strict=True)]


def compare(answers: Sequence[Sequence[int]], plain: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Return the share of answers that equal plain's, and the mean share of tokens before the first that differs."""
    shares = []
    for ours, theirs in zip(answers, plain, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(theirs))
        shares.append(same / len(theirs))
    return sum(share == 1.0 for share in shares) / len(shares), sum(shares) / len(shares)


def summarise(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Return the quality figures of a model's rows, from what `measure` kept of each."""
    plain = found.get(PLAIN)
    if plain is None:
        return {}
    figures: dict[str, dict[str, float | None]] = {}
    for name, row in found.items():
        identical, leading = compare(row["answers"], plain["answers"])
        ratio = None if row["loss"] is None or plain["loss"] is None else math.exp(row["loss"] - plain["loss"])
        figures[name] = {"identical_answers": identical, "leading_tokens": leading, "perplexity_ratio": ratio}
    return figures
