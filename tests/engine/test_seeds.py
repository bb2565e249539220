"""Seeded requests whose prompts are read in pieces: vLLM's CPU runner would end the engine (see engine/vllm/sampling.py, `mend_seeds`)."""

from __future__ import annotations

import pytest

from tests.engine.running import run_engine

pytestmark = pytest.mark.engine


def test_a_prompt_in_pieces_gives_the_seeds_own_answer(demo_model, demo_probes, heldout_prompts):
    prompts = [prompt * 4 for prompt in heldout_prompts[:4]]
    run = {"do": "generate", "prompts": prompts, "max_tokens": 16, "temperature": 0.9, "seed": 7}
    sedac = {"probe_set": str(demo_probes), "levels": False}
    llm = {"enforce_eager": True, "dtype": "float32"}
    whole, other = run_engine(demo_model, [run, run | {"seed": 1007}], sedac=sedac, **llm)
    (pieces,) = run_engine(demo_model, [run], sedac=sedac, max_num_batched_tokens=48, max_num_seqs=4, **llm)
    assert [r["tokens"] for r in pieces] == [r["tokens"] for r in whole]
    assert [r["tokens"] for r in other] != [r["tokens"] for r in whole], "the seed decides"
