"""Watches requests from arrival to finish, in vLLM's output processor: their latency, and the answers that will be audited.

Hooks two methods of the `OutputProcessor` of one engine (see frontend.py): one sees every choice before the engine does, the other every
choice that finished, but none that its client gave up. Neither changes what vLLM does or answers; an error in here is logged and costs a
figure, never a request.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sedac.agent.evidence import Book, Page
from sedac.agent.frontend import FinishReason, KeptLogprobs, hook_outputs
from sedac.agent.promise import KEPT
from sedac.agent.scoring import Answer, is_greedy
from sedac.policy.request_keys import AUDIT_KEY, ROLLOUT_KEY, TIER_KEY

_log = logging.getLogger(__name__)
_MARK = "sedac_watched"


@dataclass(kw_only=True)
class _Watched:
    page: Page
    kept: KeptLogprobs | None
    """Log-probabilities kept for the audit. None where the answer is not audited."""
    is_greedy: bool


class Watch:
    """Writes what it sees into the books that `find_book` names by roll-out (0: stable), and hands over answers to audit."""

    def __init__(
        self,
        *,
        find_book: Callable[[int], Book | None],
        on_latency: Callable[[Page, float | None, float | None], None],
        on_answer: Callable[[Page, Answer], None],
        is_own: Callable[[str], bool],
        has_processors: bool = False,
    ) -> None:
        """`on_latency` gets seconds to the first token and per token after it; `is_own` knows the ids of audits, which are not watched.

        An engine that `has_processors` of logits of its own chooses tokens by more than the model's logits.
        """
        self._find_book, self._on_latency, self._on_answer, self._is_own = find_book, on_latency, on_answer, is_own
        self._has_processors = has_processors
        self._num_begun = self._num_told = 0
        self._has_unfinished: Callable[[], bool] = lambda: False

    def install(self, output_processor: Any) -> None:
        """Hook an engine's output processor."""
        self._has_unfinished = output_processor.has_unfinished_requests
        hook_outputs(output_processor, functools.partial(self._guard, self._begin), functools.partial(self._guard, self._finish))

    def take_activity(self) -> bool:
        """Whether a choice began since the last call, or one is unfinished now; audits are choices too."""
        began, self._num_told = self._num_begun > self._num_told, self._num_begun
        return began or self._has_unfinished()

    def _guard(self, step: Callable[..., None], *args: Any) -> None:
        try:
            step(*args)
        except Exception:  # noqa: BLE001  vLLM's output handler would end, and every request with it
            _log.exception("watching a request failed; it is served all the same, and left out of the evidence")

    def _begin(self, request: Any, state: Any) -> None:
        self._num_begun += 1
        params = request.sampling_params
        if params is None or request.resumable or self._is_own(request.external_req_id):
            return
        extra = params.extra_args or {}
        if TIER_KEY not in extra:
            return  # it did not pass the input processor
        book = self._find_book(extra.get(ROLLOUT_KEY, 0))
        kept = None
        if AUDIT_KEY in extra:
            kept = state.logprobs_processor = KeptLogprobs.wrap(state.logprobs_processor, is_hidden=extra[AUDIT_KEY] == KEPT)
        if book is not None:
            setattr(state, _MARK, _Watched(page=book.get_page(extra[TIER_KEY]), kept=kept, is_greedy=not self._has_processors and is_greedy(params)))

    def _finish(self, state: Any, reason: FinishReason) -> None:
        watched: _Watched | None = getattr(state, _MARK, None)
        if watched is None:
            return
        is_error = reason in (FinishReason.ERROR, FinishReason.ABORT)
        first = each = None
        if state.stats is not None and state.stats.num_generation_tokens and not is_error:
            first, num_after = state.stats.first_token_latency, state.stats.num_generation_tokens - 1
            each = (state.stats.last_token_ts - state.stats.first_token_ts) / num_after if num_after else None
        watched.page.add_finished(is_error=is_error, first_token_seconds=first, token_seconds=each)
        self._on_latency(watched.page, first, each)
        if watched.kept is not None and watched.kept.token_ids and not is_error:
            kept = watched.kept
            answer = Answer(prompt_ids=list(state.prompt_token_ids), token_ids=kept.token_ids, logprobs=kept.chosen, is_greedy=watched.is_greedy)
            self._on_answer(watched.page, answer)
