"""What an audit compares: the answer's own log-probabilities, and those that the full model gives the same tokens.

Both are of the model's raw logits, before temperature and sampling knobs, so that they compare whatever the request asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sedac.errors import SedacError

Failure = Literal["dropped", "failed"]
FAILURES: tuple[Failure, ...] = ("dropped", "failed")
"""Why an audit gave no result: newer answers pushed it out of the queue, or it was not scored."""


class AuditFailed(SedacError):
    """An audit gave no result."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One finished choice of a bounded request."""

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    """Log-probabilities of the tokens when they were generated."""
    is_greedy: bool
    """Whether every token was the reduced model's own top choice."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What one answer lost against the full model."""

    num_tokens: int
    num_mismatches: int | None
    """Tokens that the full model would not choose after the same text. None where the request was not greedy."""
    nll_difference: float
    """Mean over the tokens of the log-probability when generated minus the log-probability in full, in nats. It is never NaN."""


def is_auditable(request: Any) -> bool:
    """Whether the full model can score an answer of this `EngineCoreRequest` (v1/engine/__init__.py, 0.32) from its token ids alone.

    A grammar changes the logits themselves before they become log-probabilities, so that those say nothing of the model's.
    """
    params = request.sampling_params
    foreign = (request.lora_request, request.prompt_embeds, request.mm_features, params.structured_outputs, params.logprob_token_ids)
    forced = (params.trace_decode_token_ids, params.thinking_token_budget)
    borrowed = (params.extra_args or {}).get("kv_transfer_params")
    return bool(request.prompt_token_ids) and not request.resumable and not any(foreign) and all(f is None for f in forced) and not borrowed


def is_greedy(params: Any) -> bool:
    """Whether these `SamplingParams` choose every token by its raw logit alone."""
    penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty - 1, params.min_tokens)
    masks = (params.logit_bias, params.allowed_token_ids, params.bad_words)
    return params.temperature == 0 and not any(penalties) and not any(masks) and not params.watermarking


def score(answer: Answer, full: Sequence[Mapping[int, Any] | None]) -> Loss:
    """Return the loss; `full` has for each token of prompt and answer the full model's log-probabilities of it and of the top choice.

    It may end before the answer does. A token that is as probable as the top choice is one.

    Raises:
        AuditFailed: there is nothing to compare.
    """
    start = len(answer.prompt_ids)
    total, num_mismatches, num_tokens = 0.0, 0, 0
    for token, own, position in zip(answer.token_ids, answer.logprobs, full[start:], strict=False):
        if position is None or token not in position:
            raise AuditFailed(f"token {num_tokens} of the answer has no log-probability in full")
        found = position[token].logprob
        total += own - found
        num_mismatches += max(choice.logprob for choice in position.values()) > found
        num_tokens += 1
    if not num_tokens:
        raise AuditFailed("no token of the answer fits into the model's context once more")
    if math.isnan(total):
        raise AuditFailed("a log-probability is no number")
    return Loss(num_tokens=num_tokens, num_mismatches=num_mismatches if answer.is_greedy else None, nll_difference=total / num_tokens)
