"""A request's promise is fixed when it arrives: its tier, its own knobs where they are allowed, and the salt that keeps its KV apart."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sedac.agent import promise
from sedac.agent.promise import Terms
from sedac.policy.model import Audit, Candidate, Policy, Tier
from sedac.policy.request_keys import AUDIT_KEY, CERTIFICATE_KEY, LEVEL_KEY, REQUEST_KEY, ROLLOUT_KEY, SCALE_KEY, SPECULATION_KEY, TIER_KEY
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from testing.strategies import certify

TIERS = (Tier(name="conservative", threshold_scale=0.5), Tier(name="balanced"))
POLICY = Policy(enabled=True, tiers=TIERS, allow_overrides=True)
TERMS = Terms(policy=POLICY, levels=("full", "skip", "width-25"))
OFF = replace(TERMS, policy=replace(POLICY, enabled=False))


def _make_request(salt: str | None = None, request_id: str = "cmpl-1", **extra):
    return SimpleNamespace(
        request_id=request_id,
        sampling_params=SamplingParams(extra_args=extra or None),
        cache_salt=salt,
        lora_request=None,
        prompt_embeds=None,
        mm_features=None,
        prompt_token_ids=[1, 2],
        resumable=False,
    )


def _stamp(request, terms: Terms = TERMS, draw: float = 0.5):
    promise.stamp(request, terms, lambda: draw)
    return request


def test_a_request_that_names_no_tier_gets_the_default_and_a_salt_that_keeps_the_users():
    plain, salted = _stamp(_make_request()), _stamp(_make_request("mine", other=1))
    assert plain.sampling_params.extra_args == {TIER_KEY: "balanced"}
    assert plain.cache_salt == "sedac-bounded:balanced:"
    assert salted.sampling_params.extra_args == {TIER_KEY: "balanced", "other": 1}
    assert salted.cache_salt == "sedac-bounded:balanced:mine"


def test_a_named_tier_is_taken():
    request = _stamp(_make_request(**{TIER_KEY: "conservative"}))
    assert request.sampling_params.extra_args[TIER_KEY] == "conservative"
    assert request.cache_salt == "sedac-bounded:conservative:"


@pytest.mark.parametrize(
    ("extra", "terms"),
    [
        ({TIER_KEY: "exact"}, TERMS),
        ({TIER_KEY: "exact"}, OFF),
        ({}, OFF),
        ({TIER_KEY: "conservative"}, OFF),
        ({SCALE_KEY: 2, LEVEL_KEY: "skip"}, OFF),
        ({}, replace(TERMS, policy=replace(POLICY, default_tier="exact"))),
    ],
)
def test_exact_requests_are_marked_and_keep_their_salt(extra, terms):
    request = _stamp(_make_request("mine", **extra, other=1), terms)
    assert request.cache_salt == "mine"
    assert request.sampling_params.extra_args == {TIER_KEY: "exact", "other": 1}, "and no knob of their own is left for a worker to find"


@pytest.mark.parametrize("terms", [TERMS, OFF])
@pytest.mark.parametrize("tier", ["turbo", "", 3, ["exact"]])
def test_unknown_tiers_are_refused_with_the_list(terms, tier):
    with pytest.raises(VLLMValidationError, match="tiers: 'exact', 'conservative', 'balanced', or leave it out for 'balanced'"):
        _stamp(_make_request(**{TIER_KEY: tier}), terms)


def test_a_policy_without_tiers_has_balanced():
    with pytest.raises(VLLMValidationError, match="tiers: 'exact', 'balanced', or"):
        _stamp(_make_request(**{TIER_KEY: "turbo"}), replace(TERMS, policy=Policy(enabled=True)))


@pytest.mark.parametrize("extra", [{SCALE_KEY: 1.0}, {LEVEL_KEY: "skip"}])
def test_overrides_are_refused_unless_the_policy_allows_them(extra):
    with pytest.raises(VLLMValidationError, match="sedac ctl policy set --allow-overrides"):
        _stamp(_make_request(**extra), replace(TERMS, policy=replace(POLICY, allow_overrides=False)))


@pytest.mark.parametrize("scale", [-1, float("nan"), float("inf"), "2", True, [1]])
def test_threshold_scales_must_be_numbers(scale):
    with pytest.raises(VLLMValidationError, match="not a finite number >= 0"):
        _stamp(_make_request(**{SCALE_KEY: scale}))


@pytest.mark.parametrize("level", ["width-99", 1, ["skip"], ""])
def test_levels_must_be_the_engines(level):
    with pytest.raises(VLLMValidationError, match="levels: 'full', 'skip', 'width-25'"):
        _stamp(_make_request(**{LEVEL_KEY: level}))


@pytest.mark.parametrize("terms", [TERMS, replace(TERMS, policy=replace(POLICY, default_tier="exact"))])
def test_overrides_of_exact_requests_are_refused(terms):
    extra = {} if terms is not TERMS else {TIER_KEY: "exact"}
    with pytest.raises(VLLMValidationError, match="has no meaning for tier 'exact'"):
        _stamp(_make_request(**{SCALE_KEY: 2}, **extra), terms)


def test_overrides_reach_the_workers_as_plain_values():
    extra = _stamp(_make_request(**{SCALE_KEY: 2, LEVEL_KEY: "skip"})).sampling_params.extra_args
    assert extra == {TIER_KEY: "balanced", SCALE_KEY: 2.0, LEVEL_KEY: "skip"}
    assert json.loads(json.dumps(extra)) == extra
    assert type(extra[SCALE_KEY]) is float


_salts = st.one_of(st.none(), st.text(max_size=6), st.sampled_from(["balanced:", "+sedac_level=skip:", "a:b"]))
_promises = st.tuples(
    st.sampled_from([None, "exact", "conservative", "balanced"]),
    st.sampled_from([None, 0.5, 1, 2.0]),
    st.sampled_from([None, "skip", "width-25"]),
    _salts,
)


@given(_promises, _promises)
def test_kv_is_shared_only_by_requests_of_one_promise_and_one_salt(first, second):
    seen = []
    for tier, scale, level, salt in (first, second):
        if tier == "exact":
            scale = level = None
        extra = {key: value for key, value in ((TIER_KEY, tier), (SCALE_KEY, scale), (LEVEL_KEY, level)) if value is not None}
        request = _stamp(_make_request(salt, **extra))
        promised = {key: request.sampling_params.extra_args.get(key) for key in (TIER_KEY, SCALE_KEY, LEVEL_KEY)}
        seen.append(((promised, salt or ""), request.cache_salt or ""))
    (one, one_salt), (other, other_salt) = seen
    assert (one == other) == (one_salt == other_salt)


def test_a_salt_that_would_reach_bounded_kv_is_refused():
    with pytest.raises(VLLMValidationError, match="may not begin with 'sedac-bounded:'"):
        _stamp(_make_request("sedac-bounded:balanced:", **{TIER_KEY: "exact"}))


def test_requests_of_the_certified_tier_carry_its_certificate_and_share_no_kv_with_others():
    policy = certify(POLICY)
    knobs = policy.certificate.knobs_sha256
    certified = _stamp(_make_request(), replace(TERMS, policy=policy))
    assert certified.sampling_params.extra_args == {TIER_KEY: "balanced", CERTIFICATE_KEY: knobs}
    assert certified.cache_salt == f"sedac-bounded:balanced+sedac_certificate={knobs}:"
    before = _stamp(_make_request())
    assert before.cache_salt != certified.cache_salt, "its KV was written under knobs that nobody certified"
    for extra in ({TIER_KEY: "conservative"}, {TIER_KEY: "exact"}, {SCALE_KEY: 1.0}, {LEVEL_KEY: "skip"}):
        assert CERTIFICATE_KEY not in _stamp(_make_request(**extra), replace(TERMS, policy=policy)).sampling_params.extra_args
    adapted = _make_request()
    adapted.lora_request = object()
    assert CERTIFICATE_KEY not in _stamp(adapted, replace(TERMS, policy=policy)).sampling_params.extra_args, "an adapter is other weights"
    off = replace(TERMS, policy=replace(policy, enabled=False))
    assert CERTIFICATE_KEY not in _stamp(_make_request(), off).sampling_params.extra_args


@pytest.mark.parametrize("extra", [{}, {TIER_KEY: "exact"}])
def test_no_request_can_certify_itself(extra):
    request = _stamp(_make_request(**{CERTIFICATE_KEY: "1" * 64}, **extra))
    assert CERTIFICATE_KEY not in request.sampling_params.extra_args
    assert "certificate" not in (request.cache_salt or "")


CANDIDATE = Policy(enabled=True, tiers=(Tier(name="balanced"), Tier(name="new")), default_tier="new", audit=Audit(share=1.0))


def _make_terms(share: float, policy: Policy = CANDIDATE, **changes) -> Terms:
    return replace(TERMS, candidate=Candidate(rollout=7, policy=policy, share=share), **changes)


def test_a_candidate_request_is_promised_by_the_candidate_and_shares_no_kv_with_the_policy_in_force():
    request = _stamp(_make_request("mine"), _make_terms(1.0))
    assert request.sampling_params.extra_args == {TIER_KEY: "new", ROLLOUT_KEY: 7}
    assert request.cache_salt == "sedac-bounded:new+rollout=7:mine"
    stable = _stamp(_make_request("mine"), _make_terms(0.0))
    assert stable.sampling_params.extra_args == {TIER_KEY: "balanced"}
    named = _stamp(_make_request("mine", **{TIER_KEY: "balanced"}), _make_terms(1.0))
    assert named.cache_salt not in (stable.cache_salt, request.cache_salt)
    with pytest.raises(VLLMValidationError, match="is not allowed by the policy in force"):
        _stamp(_make_request(**{SCALE_KEY: 2.0}), _make_terms(1.0))
    certified = _stamp(_make_request(), _make_terms(1.0, certify(CANDIDATE, "new")))
    assert certified.cache_salt == f"sedac-bounded:new+rollout=7+sedac_certificate={certify(CANDIDATE, 'new').certificate.knobs_sha256}:"


def test_a_candidate_that_is_off_promises_exactness():
    request = _stamp(_make_request("mine"), _make_terms(1.0, replace(CANDIDATE, enabled=False)))
    assert request.sampling_params.extra_args == {TIER_KEY: "exact", ROLLOUT_KEY: 7}
    assert request.cache_salt == "mine"


def test_a_tier_that_only_the_policy_in_force_has_is_served_by_that():
    assert ROLLOUT_KEY not in _stamp(_make_request(**{TIER_KEY: "conservative"}), _make_terms(1.0)).sampling_params.extra_args
    with pytest.raises(VLLMValidationError, match="tiers: 'exact', 'balanced', 'new'"):
        _stamp(_make_request(**{TIER_KEY: "turbo"}), _make_terms(1.0))


@given(st.text(max_size=8) | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False), st.floats(0, 1), st.floats(0, 1))
def test_a_key_keeps_its_policy_while_the_share_grows(key, one, other):
    def is_candidate(share: float, request_id: str) -> bool:
        extra = _stamp(_make_request(request_id=request_id, **{REQUEST_KEY: key}), _make_terms(share)).sampling_params.extra_args
        assert REQUEST_KEY not in extra, "who it is for is nobody's business further on"
        return ROLLOUT_KEY in extra

    small, large = sorted((one, other))
    assert is_candidate(small, "cmpl-1") == is_candidate(small, "cmpl-2")
    assert is_candidate(large, "cmpl-1") or not is_candidate(small, "cmpl-1")


def test_the_share_of_requests_without_a_key_is_the_candidates():
    sides = [ROLLOUT_KEY in _stamp(_make_request(request_id=f"cmpl-{i}"), _make_terms(0.25)).sampling_params.extra_args for i in range(2000)]
    assert 400 < sum(sides) < 600


@pytest.mark.parametrize("key", [True, [1], "x" * 1025])
@pytest.mark.parametrize("terms", [TERMS, _make_terms(1.0)])
def test_keys_must_be_short_texts_or_numbers(key, terms):
    with pytest.raises(VLLMValidationError, match="sedac_key is no text or number"):
        _stamp(_make_request(**{REQUEST_KEY: key}), terms)


@pytest.mark.parametrize("extra", [{}, {TIER_KEY: "exact"}])
def test_no_request_chooses_its_policy_or_its_audit(extra):
    forged = {ROLLOUT_KEY: 7, AUDIT_KEY: "kept"}
    for terms in (TERMS, _make_terms(0.0)):
        assert not forged.keys() & _stamp(_make_request(**forged, **extra), terms).sampling_params.extra_args.keys()


AUDITED = replace(TERMS, policy=replace(POLICY, audit=Audit(share=0.25)), can_audit=True)


def test_the_drawn_share_of_bounded_requests_keeps_its_log_probabilities():
    chosen, left = _stamp(_make_request(), AUDITED, 0.2499).sampling_params, _stamp(_make_request(), AUDITED, 0.25).sampling_params
    assert (chosen.logprobs, chosen.extra_args) == (0, {TIER_KEY: "balanced", AUDIT_KEY: "kept"})
    assert (left.logprobs, left.extra_args) == (None, {TIER_KEY: "balanced"})
    asked = _make_request()
    asked.sampling_params.logprobs = 3
    assert (_stamp(asked, AUDITED, 0.0).sampling_params.logprobs, asked.sampling_params.extra_args[AUDIT_KEY]) == (3, "asked")
    candidate = _stamp(_make_request(), replace(_make_terms(1.0), can_audit=True), 0.99)
    assert AUDIT_KEY in candidate.sampling_params.extra_args, "the share is the candidate's own"


def test_exact_and_foreign_requests_are_not_audited():
    foreign = _make_request()
    foreign.mm_features = [object()]
    for request, terms in (
        (_make_request(**{TIER_KEY: "exact"}), AUDITED),
        (_make_request(), replace(AUDITED, policy=replace(AUDITED.policy, enabled=False))),
        (_make_request(), replace(AUDITED, can_audit=False)),
        (foreign, AUDITED),
    ):
        params = _stamp(request, terms, 0.0).sampling_params
        assert params.logprobs is None
        assert AUDIT_KEY not in params.extra_args


@pytest.mark.parametrize("tier", ["exact", "balanced"])
@pytest.mark.parametrize("value", [False, 0, 0.0, "false", "False", "0", "no", "off"])
def test_a_request_that_wants_no_drafts_reaches_the_workers_as_such_and_shares_kv_with_the_others(tier, value):
    request, other = _stamp(_make_request("mine", **{TIER_KEY: tier, SPECULATION_KEY: value})), _stamp(_make_request("mine", **{TIER_KEY: tier}))
    assert request.sampling_params.extra_args == {TIER_KEY: tier, SPECULATION_KEY: False}
    assert request.cache_salt == other.cache_salt, "drafts change no answer"


@pytest.mark.parametrize("terms", [TERMS, OFF, _make_terms(1.0)])
@pytest.mark.parametrize("value", [None, True, 1, 1.0, "true", "TRUE", "yes", "on"])
def test_a_request_that_wants_drafts_is_as_one_that_says_nothing(terms, value):
    request, other = _stamp(_make_request(**{SPECULATION_KEY: value}), terms), _stamp(_make_request(), terms)
    assert request.sampling_params.extra_args == other.sampling_params.extra_args


@pytest.mark.parametrize("terms", [TERMS, OFF])
@pytest.mark.parametrize("value", ["perhaps", "", 2, -1, 0.5, float("nan"), [1], ["false"], {}])
def test_what_is_neither_true_nor_false_is_refused(terms, value):
    with pytest.raises(VLLMValidationError, match="sedac_speculation is neither true nor false; leave it out for true"):
        _stamp(_make_request(**{SPECULATION_KEY: value}), terms)


def test_false_in_the_json_of_a_request_is_understood():
    body = '{"model": "m", "prompt": "x", "vllm_xargs": {"sedac_speculation": false, "sedac_tier": "exact"}}'
    params = CompletionRequest.model_validate_json(body).to_sampling_params(8, {})
    request = _make_request()
    request.sampling_params = params
    assert _stamp(request).sampling_params.extra_args == {TIER_KEY: "exact", SPECULATION_KEY: False}


def test_a_certified_request_without_drafts_keeps_its_certificate():
    policy = certify(POLICY)
    extra = _stamp(_make_request(**{SPECULATION_KEY: False}), replace(TERMS, policy=policy)).sampling_params.extra_args
    assert extra == {TIER_KEY: "balanced", CERTIFICATE_KEY: policy.certificate.knobs_sha256, SPECULATION_KEY: False}


def test_pooling_requests_pass():
    request = SimpleNamespace(sampling_params=None, cache_salt=None)
    promise.stamp(request, TERMS)
    assert request.cache_salt is None


def test_both_ways_into_the_engine_are_stamped():
    async def process_async():
        return _make_request()

    processor = SimpleNamespace(process_inputs=_make_request, process_inputs_async=process_async)
    promise.install(processor, lambda: TERMS)
    assert processor.process_inputs().cache_salt
    assert asyncio.run(processor.process_inputs_async()).cache_salt
