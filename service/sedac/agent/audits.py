"""Audits: finished bounded answers scored again in full, one at a time, when the engine has time.

One prefill of prompt and answer, tier exact, under a cache salt of its own, behind every other request (`--scheduling-policy priority`,
which `sedac serve` sets). It waits for a moment without waiting prompts, though not for ever: an engine that never rests is audited too.
What can't be kept or scored is counted, so that missing audits are seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sedac.agent.evidence import Page
from sedac.agent.frontend import make_prefill
from sedac.agent.scoring import Answer, AuditFailed, Failure, Loss, score
from sedac.policy.model import EXACT
from sedac.policy.request_keys import TIER_KEY

_log = logging.getLogger(__name__)
_PRIORITY = 2**31 - 1  # the greatest number is served last
_MAX_WAITING = 256
_MAX_WAITING_TOKENS = 4 * 2**20
_LOOK_SECONDS = 0.02


@dataclass(kw_only=True)
class Auditor:
    """Scores answers through an engine client; everything runs on the event loop."""

    client: Any
    max_model_len: int
    """Longest sequence that the engine takes, in tokens."""
    on_result: Callable[[Page, Loss | Failure], None]
    patience_seconds: float = 5.0
    """How long an audit waits for a moment without waiting prompts."""
    timeout_seconds: float = 60.0
    """How long an audit may take in the engine."""
    _queue: deque[tuple[Page, Answer]] = field(default_factory=deque)
    _num_tokens: int = 0
    _own: set[str] = field(default_factory=set)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    def is_own(self, request_id: str) -> bool:
        """Whether a request is an audit; its id holds 128 random bits, so that no user can name one."""
        return request_id in self._own

    def add(self, page: Page, answer: Answer) -> None:
        """Queue an answer; the oldest give way to it."""
        self._queue.append((page, answer))
        self._num_tokens += _get_size(answer)
        while len(self._queue) > _MAX_WAITING or (self._num_tokens > _MAX_WAITING_TOKENS and len(self._queue) > 1):
            self._report(self._pop()[0], "dropped")
        self._wake.set()

    def get_num_waiting(self) -> int:
        """Return how many answers wait to be audited."""
        return len(self._queue)

    async def run(self) -> None:
        """Audit until cancelled."""
        while True:
            self._wake.clear()
            if not self._queue:
                await self._wake.wait()
            await self._wait_for_rest()
            if self._queue:
                await self._audit(*self._pop())

    def _pop(self) -> tuple[Page, Answer]:
        page, answer = self._queue.popleft()
        self._num_tokens -= _get_size(answer)
        return page, answer

    async def _wait_for_rest(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.patience_seconds):
                while self.client.get_num_queued_tokens():  # noqa: ASYNC110  the engine announces nothing
                    await asyncio.sleep(_LOOK_SECONDS)

    async def _audit(self, page: Page, answer: Answer) -> None:
        try:
            async with asyncio.timeout(self.timeout_seconds):
                loss = score(answer, await self._prefill(answer))
        except (AuditFailed, TimeoutError) as error:
            _log.warning("an answer of tier %s could not be audited: %s", page.tier, error or f"not done in {self.timeout_seconds:g} s")
            self._report(page, "failed")
        except Exception:  # noqa: BLE001  whatever an engine raises, the next audit may succeed
            _log.exception("an answer of tier %s could not be audited", page.tier)
            self._report(page, "failed")
        else:
            self._report(page, loss)

    async def _prefill(self, answer: Answer) -> Any:
        """Return the full model's log-probabilities of every token of prompt and answer that fits into the context with one to generate."""
        request_id = f"sedac-audit-{secrets.token_hex(16)}"
        tokens = [*answer.prompt_ids, *answer.token_ids][: self.max_model_len - 1]
        prompt, params = make_prefill(tokens, cache_salt=f"sedac-audit:{secrets.token_hex(16)}", extra={TIER_KEY: EXACT})
        self._own.add(request_id)
        try:
            outputs = [output async for output in self.client.generate(prompt, params, request_id, priority=_PRIORITY)]
        finally:
            self._own.discard(request_id)
        if not outputs or not outputs[-1].prompt_logprobs:
            raise AuditFailed("the engine returned no log-probabilities")
        return outputs[-1].prompt_logprobs

    def _report(self, page: Page, result: Loss | Failure) -> None:
        if isinstance(result, str):
            page.num_audit_failures += 1
        else:
            page.add_loss(result)
        self.on_result(page, result)


def _get_size(answer: Answer) -> int:
    return len(answer.prompt_ids) + len(answer.token_ids)
