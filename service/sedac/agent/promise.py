"""The promise of each request, fixed when it arrives: exact, or bounded.

A bounded request may be reduced; the KV it writes is kept apart from exact requests by a cache salt. An exact one is never
reduced, whatever policy comes later. So an exact request never reads KV that was written under a bounded decision.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

from vllm.exceptions import VLLMValidationError

from sedac.policy import TIER_KEY

BOUNDED_SALT = "sedac-bounded"


def stamp(request: Any, *, bounded: bool) -> None:
    """Fix the promise of an `EngineCoreRequest` in place; `bounded` says whether the policy in force reduces at all.

    Raises:
        VLLMValidationError: the request asks for a tier that doesn't exist (vLLM answers HTTP 400).
    """
    params = request.sampling_params
    if params is None:
        return
    extra = dict(params.extra_args or {})
    tier = extra.get(TIER_KEY)
    if tier not in (None, "exact"):
        raise VLLMValidationError(f"{TIER_KEY} is unknown; tiers: 'exact', or leave it out for the policy in force", parameter=TIER_KEY, value=tier)
    if tier is None and bounded:
        request.cache_salt = f"{BOUNDED_SALT}:{request.cache_salt or ''}"
        return
    params.extra_args = {**extra, TIER_KEY: "exact"}


def install(input_processor: Any, is_bounded: Callable[[], bool]) -> None:
    """Stamp every request that passes vLLM's input processor (v1/engine/input_processor.py, 0.32), raw or rendered."""
    process: Callable[..., Any] = input_processor.process_inputs
    process_async: Callable[..., Awaitable[Any]] = input_processor.process_inputs_async

    @functools.wraps(process)
    def process_inputs(*args: Any, **kwargs: Any) -> Any:
        request = process(*args, **kwargs)
        stamp(request, bounded=is_bounded())
        return request

    async def process_inputs_async(*args: Any, **kwargs: Any) -> Any:
        request = await process_async(*args, **kwargs)
        stamp(request, bounded=is_bounded())
        return request

    input_processor.process_inputs = process_inputs
    input_processor.process_inputs_async = process_inputs_async
