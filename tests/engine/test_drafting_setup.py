"""What vLLM is told of SEDAC's drafts, in its own configuration; its other methods keep theirs."""

from __future__ import annotations

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
    from sedac.engine.drafting.setup import prepare
    from vllm.engine.arg_utils import EngineArgs

    prepare()
    prepare()
    made = EngineArgs(model=str(demo_model), max_model_len=512, speculative_config=config).create_engine_config()
    sent = pickle.loads(pickle.dumps(made))  # as the engine's process gets it
    assert sent.num_lookahead_tokens == lookahead
    assert sent.speculative_config.num_speculative_tokens_per_batch_size == lengths


@pytest.mark.parametrize("knobs", [{"min_p": 0.1}, {"logit_bias": {5: 1.0}}])
def test_requests_that_cannot_be_verified_are_served_without_drafts(knobs):
    from sedac.engine import sampling
    from vllm import SamplingParams

    assert not sampling.can_verify(SamplingParams(**knobs))
    assert sampling.can_verify(SamplingParams(temperature=0.7, top_p=0.9, top_k=20, seed=1, repetition_penalty=1.1))
