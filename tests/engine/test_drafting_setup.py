"""What vLLM is told of SEDAC's drafts, in its own configuration; its other methods keep theirs."""

from __future__ import annotations

import copy
import pickle

import pytest

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("config", "lookahead", "lengths"),
    [
        ({"method": "custom_class", "model": "sedac.engine.drafting.drafter.Drafter", "num_speculative_tokens": 5}, 5, [(1, 1, 5)]),
        ({"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 3}, 0, None),
    ],
)
def test_slots_and_lengths(demo_model, monkeypatch, config, lookahead, lengths):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    from sedac.engine.vllm.speculation import prepare
    from vllm.engine.arg_utils import EngineArgs

    prepare()
    prepare()
    made = EngineArgs(model=str(demo_model), max_model_len=512, speculative_config=config).create_engine_config()
    sent = pickle.loads(pickle.dumps(made))  # as the engine's process gets it
    assert sent.num_lookahead_tokens == lookahead
    assert sent.speculative_config.num_speculative_tokens_per_batch_size == lengths


@pytest.mark.parametrize("knobs", [{"min_p": 0.1}, {"logit_bias": {5: 1.0}}])
def test_requests_that_cannot_be_verified_are_served_without_drafts(knobs):
    from sedac.engine.vllm import sampling
    from vllm import SamplingParams

    assert not sampling.can_verify(SamplingParams(**knobs))
    assert sampling.can_verify(SamplingParams(temperature=0.7, top_p=0.9, top_k=20, seed=1, repetition_penalty=1.1))


def test_drafts_come_with_a_steps_result(monkeypatch):
    """And are asked for where they do not, as with vLLM's own methods."""
    from sedac.engine.vllm.speculation import DRAFTS, prepare
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor
    from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, DraftTokenIds

    prepare()
    executor, asked = MultiprocExecutor.__new__(MultiprocExecutor), []
    results = []
    monkeypatch.setattr(MultiprocExecutor, "collective_rpc", lambda self, method, **_: asked.append(method) or results.pop(0))
    monkeypatch.setattr(MultiprocExecutor, "kv_output_aggregator", None, raising=False)
    monkeypatch.setattr(MultiprocExecutor, "ec_output_aggregator", None, raising=False)
    monkeypatch.setattr(MultiprocExecutor, "output_rank", 0, raising=False)

    for drafts in (DraftTokenIds(["a"], [[1, 2]]), None):
        made = copy.copy(EMPTY_MODEL_RUNNER_OUTPUT)
        setattr(made, DRAFTS, drafts)
        results[:] = [pickle.loads(pickle.dumps(made))]
        executor.sample_tokens(None)
        assert executor.take_draft_token_ids() == drafts
        assert asked.pop() == "sample_tokens"
        assert not asked
    results[:] = [copy.copy(EMPTY_MODEL_RUNNER_OUTPUT), "theirs", "theirs again"]
    executor.sample_tokens(None)
    assert executor.take_draft_token_ids() == "theirs"
    assert executor.take_draft_token_ids() == "theirs again", "a step without a result is asked for its own"
    assert asked == ["sample_tokens", "take_draft_token_ids", "take_draft_token_ids"]
