"""Off means off: with SEDAC attached and disabled, tokens and log-probabilities are plain vLLM's."""

from __future__ import annotations

import pytest

from tests.engine.running import run_engine

pytestmark = pytest.mark.engine


_CASES = [
    (True, 8, 16),
    *(pytest.param(eager, *size, marks=pytest.mark.thorough) for eager in (True, False) for size in ((16, 32), (64, 64))),
]
"""whether uncompiled, prompts, tokens; compiled and small: test_compiled.py"""


@pytest.mark.parametrize(("eager", "num_prompts", "max_tokens"), _CASES)
def test_disabled_equals_plain_vllm(demo_model, demo_probes, heldout_prompts, eager, num_prompts, max_tokens):
    prompts = heldout_prompts[:num_prompts]
    steps = [{"do": "generate", "prompts": prompts, "batch": batch, "max_tokens": max_tokens, "logprobs": 0} for batch in (1, 8)]
    plain = run_engine(demo_model, steps, enforce_eager=eager)
    attached = run_engine(demo_model, steps, sedac={"probe_set": str(demo_probes)}, enforce_eager=eager)
    for batch, theirs, ours in zip((1, 8), plain, attached, strict=True):
        assert [r["tokens"] for r in ours] == [r["tokens"] for r in theirs], f"tokens differ at batch {batch}"
        assert [r["logprobs"] for r in ours] == [r["logprobs"] for r in theirs], f"log-probabilities differ at batch {batch}"


@pytest.mark.parametrize("name", ["exact", "unstamped"])
def test_exact_tier_equals_plain_vllm_beside_reduced_requests(demo_model, demo_probes, heldout_prompts, name):
    """And a request that reaches the engine without the server's stamp is exact too."""
    prompts = heldout_prompts[:16]
    plain = run_engine(demo_model, [{"do": "generate", "prompts": prompts}], enforce_eager=True, dtype="float32")[0]
    tiers = [name if i % 2 else None for i in range(16)]
    steps = [
        {"do": "apply", "policy": {"enabled": True, "checkpoints": [{"layer": 2, "threshold": 1e9}]}},
        {"do": "generate", "prompts": prompts, "tiers": tiers},
    ]
    mixed = run_engine(demo_model, steps, sedac={"probe_set": str(demo_probes)}, enforce_eager=True, dtype="float32")[1]
    assert [r["tokens"] for r in mixed[1::2]] == [r["tokens"] for r in plain[1::2]]
    assert [r["tokens"] for r in mixed[::2]] != [r["tokens"] for r in plain[::2]], "skipping nearly all MLPs must show"
