"""A request's promise is fixed when it arrives: salt for bounded ones, the exact tier for all others."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from sedac.agent import promise
from sedac.policy import TIER_KEY
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams


def _make_request(salt: str | None = None, **extra):
    return SimpleNamespace(sampling_params=SamplingParams(extra_args=extra or None), cache_salt=salt)


def test_bounded_requests_get_a_salt_of_their_own_that_keeps_the_users():
    plain, salted = _make_request(), _make_request("mine")
    promise.stamp(plain, bounded=True)
    promise.stamp(salted, bounded=True)
    assert plain.cache_salt
    assert plain.cache_salt != salted.cache_salt
    assert "mine" in salted.cache_salt
    assert plain.sampling_params.extra_args is None


@pytest.mark.parametrize(("extra", "bounded"), [({}, False), ({TIER_KEY: "exact"}, True), ({TIER_KEY: "exact"}, False)])
def test_exact_requests_are_marked_and_keep_their_salt(extra, bounded):
    request = _make_request("mine", **extra, other=1)
    promise.stamp(request, bounded=bounded)
    assert request.cache_salt == "mine"
    assert request.sampling_params.extra_args == {TIER_KEY: "exact", "other": 1}


def test_unknown_tiers_are_refused():
    with pytest.raises(VLLMValidationError, match="tiers: 'exact'"):
        promise.stamp(_make_request(**{TIER_KEY: "turbo"}), bounded=True)


def test_pooling_requests_pass():
    request = SimpleNamespace(sampling_params=None, cache_salt=None)
    promise.stamp(request, bounded=True)
    assert request.cache_salt is None


def test_both_ways_into_the_engine_are_stamped():
    async def process_async():
        return _make_request()

    processor = SimpleNamespace(process_inputs=_make_request, process_inputs_async=process_async)
    promise.install(processor, lambda: True)
    assert processor.process_inputs().cache_salt
    assert asyncio.run(processor.process_inputs_async()).cache_salt
