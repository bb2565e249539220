"""What an audit compares, and what it must not."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sedac.agent.evidence import open_book
from sedac.agent.scoring import Answer, AuditFailed, Loss, is_auditable, is_greedy, score
from sedac.contract import wire
from sedac.policy.model import Policy, Tier
from vllm.logprobs import Logprob
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

PROMPT = [7, 8]
POLICY = Policy(enabled=True, tiers=(Tier(name="mine"),), default_tier="mine")


def _make_answer(**changes) -> Answer:
    return Answer(**({"prompt_ids": PROMPT, "token_ids": [1, 2, 3], "logprobs": [-0.5, -0.5, -0.5], "is_greedy": True} | changes))


def _make_full(*positions: dict[int, float]) -> list:
    return [None, {8: Logprob(-9.0)}, *({token: Logprob(value) for token, value in position.items()} for position in positions)]


def test_tokens_that_the_full_model_would_not_choose_are_counted_and_ties_are_not():
    loss = score(_make_answer(), _make_full({1: -0.1}, {2: -1.5, 5: -0.25}, {3: -0.75, 6: -0.75}))
    assert loss == Loss(num_tokens=3, num_mismatches=1, nll_difference=pytest.approx((-0.4 + 1.0 + 0.25) / 3))


def test_a_sampled_answer_has_no_mismatches_to_count():
    assert score(_make_answer(is_greedy=False), _make_full({1: -3.0, 2: -0.1})).num_mismatches is None


def test_the_part_that_fits_into_the_context_is_scored():
    assert score(_make_answer(), _make_full({1: -0.5}, {2: -0.5})).num_tokens == 2


@pytest.mark.parametrize(
    ("answer", "full"),
    [
        (_make_answer(), _make_full()),
        (_make_answer(), _make_full({9: -0.1})),
        (_make_answer(logprobs=[-math.inf] * 3), _make_full({1: -math.inf})),
        (_make_answer(logprobs=[math.nan] * 3), _make_full({1: -1.0})),
    ],
)
def test_what_can_not_be_compared_is_a_failure_and_no_figure(answer, full):
    with pytest.raises(AuditFailed):
        score(answer, full)


def _make_request(**changes):
    known = {"lora_request": None, "prompt_embeds": None, "mm_features": None, "prompt_token_ids": PROMPT, "resumable": False}
    return SimpleNamespace(**(known | {"sampling_params": SamplingParams()} | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_request": object()},
        {"prompt_embeds": [1]},
        {"mm_features": [object()]},
        {"prompt_token_ids": None},
        {"prompt_token_ids": []},
        {"resumable": True},
        {"sampling_params": SamplingParams(structured_outputs=StructuredOutputsParams(regex="a+"))},
        {"sampling_params": SamplingParams(logprob_token_ids=[3])},
        {"sampling_params": SamplingParams(thinking_token_budget=5)},
        {"sampling_params": SamplingParams(extra_args={"kv_transfer_params": {"do_remote_prefill": True}})},
    ],
)
def test_what_the_token_ids_alone_do_not_tell_is_not_audited(changes):
    assert is_auditable(_make_request())
    assert not is_auditable(_make_request(**changes))


@pytest.mark.parametrize(
    "knobs",
    [
        {"temperature": 0.7},
        {"repetition_penalty": 1.1},
        {"frequency_penalty": 0.5},
        {"presence_penalty": -0.5},
        {"logit_bias": {3: 1.0}},
        {"allowed_token_ids": [3]},
        {"bad_words": ["no"]},
        {"min_tokens": 2},
    ],
)
def test_only_the_model_itself_chooses_in_a_greedy_request(knobs):
    assert is_greedy(SamplingParams(temperature=0, top_p=0.5, stop=["x"], ignore_eos=True))
    assert not is_greedy(SamplingParams(**({"temperature": 0} | knobs)))


@given(
    st.lists(
        st.builds(
            lambda total, share, difference: Loss(num_tokens=total, num_mismatches=min(total, int(share * total)), nll_difference=difference),
            st.integers(1, 5000),
            st.floats(0, 1),
            st.floats(allow_nan=False),
        ),
        max_size=8,
    )
)
def test_evidence_is_always_what_the_contract_can_carry(losses):
    page = open_book(None, POLICY, revision=3).get_page("mine")
    for loss in losses:
        page.add_loss(loss)
    message = wire.evidence_to_proto(page)
    assert sum(message.mismatch_counts.values()) == sum(message.nll_difference_counts.values()) == len(losses)
    assert all(0 <= thousandths <= 1000 for thousandths in message.mismatch_counts)
    assert all(-1000 <= thousandths <= 1000 for thousandths in message.nll_difference_counts)
    assert message.num_audited_tokens == sum(loss.num_tokens for loss in losses)
    shown = page.to_dict(0.95)
    assert shown["num_audited"] == len(losses)
    assert not losses or shown["mismatch"]["lower"] <= shown["mismatch"]["mean"] <= shown["mismatch"]["upper"]


def test_losses_are_rounded_down():
    page = open_book(None, POLICY).get_page("mine")
    page.add_loss(Loss(num_tokens=3, num_mismatches=2, nll_difference=-0.0001))
    page.add_loss(Loss(num_tokens=10, num_mismatches=3, nll_difference=0.0019))
    assert dict(page.mismatch_counts) == {666: 1, 300: 1}
    assert dict(page.nll_difference_counts) == {-1: 1, 1: 1}


def test_a_book_is_kept_for_the_same_policy_and_opened_for_another():
    book = open_book(None, POLICY, revision=3)
    assert open_book(book, POLICY, revision=3) is book, "pushed again after a reconnect"
    for other in (open_book(book, POLICY, revision=4), open_book(book, Policy(), revision=3), open_book(book, POLICY, rollout=3)):
        assert other is not book
    assert set(book.pages) == {"exact", "mine"}
    assert (open_book(None, POLICY, rollout=3).side, book.side) == ("candidate", "stable")
