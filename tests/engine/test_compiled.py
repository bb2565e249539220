"""Compiled by vLLM, on a model of three layers: off is plain vLLM, levels are the reference's, drafts change no token.

The same on the whole demo model is in test_exact.py, test_decisions.py, test_levels.py and test_drafting.py, where it is thorough.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.level_steps import add_levels, check_levels, make_level_steps
from tests.engine.running import DRAFTER, run_engine, speculation

pytestmark = pytest.mark.engine

_LLM = {"enforce_eager": False, "dtype": "float32"}


@pytest.fixture(scope="module")
def level_set(tmp_path_factory, short_model, short_probes, heldout_prompts) -> Path:
    return add_levels(tmp_path_factory.mktemp("probe-set"), short_model, short_probes, heldout_prompts[0])


@pytest.fixture(scope="module")
def runs(heldout_prompts) -> list[dict]:
    """Greedy answers one by one and in batches of 8."""
    run = {"do": "generate", "prompts": heldout_prompts[:16], "max_tokens": 32, "logprobs": 0}
    return [run | {"batch": batch} for batch in (1, 8)]


@pytest.fixture(scope="module")
def plain(short_model, runs) -> list[list[dict]]:
    return run_engine(short_model, runs, **_LLM)


@pytest.fixture(scope="module")
def level_prompts(heldout_prompts) -> list[list[int]]:
    return [prompt[:40] for prompt in heldout_prompts[:4]]


@pytest.fixture(scope="module")
def attached(short_model, short_probes, level_set, runs, level_prompts) -> list:
    """With SEDAC: answers while it is off, then the steps of test_levels.py."""
    steps = [*runs, *make_level_steps(short_probes, level_prompts)]
    return run_engine(short_model, steps, sedac={"probe_set": str(level_set)}, **_LLM)


def test_disabled_equals_plain_vllm(plain, attached):
    for theirs, ours in zip(plain, attached, strict=False):
        assert [r["tokens"] for r in ours] == [r["tokens"] for r in theirs]
        assert [r["logprobs"] for r in ours] == [r["logprobs"] for r in theirs]


def test_levels_equal_the_reference(short_model, level_set, level_prompts, runs, attached):
    check_levels(short_model, level_set, level_prompts, attached[len(runs) :], max_share=0.87)  # a third is the layer that is never reduced


def test_drafts_change_no_token(short_model, short_probes, short_drafts, runs, plain):
    """Beside chunked prompts and cached prefixes, one by one and together."""
    sedac = {"probe_set": str(short_probes), "draft": str(short_drafts["adapter"])}
    more = {"speculative_config": DRAFTER, "enable_prefix_caching": True, "block_size": 32, "max_num_batched_tokens": 64, "max_num_seqs": 16}
    _, *drafted, stats = run_engine(short_model, [speculation(), *runs, {"do": "stats"}], sedac=sedac, **_LLM, **more)
    for theirs, ours in zip(plain, drafted, strict=True):
        assert [r["tokens"] for r in ours] == [r["tokens"] for r in theirs]
    assert 0 < stats["drafting"]["num_accepted"] < stats["drafting"]["num_drafted"]
