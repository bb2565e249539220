"""SEDAC beside vLLM's other features: what works equals the same run without the feature, what does not is refused by name.

Everything in fp32, where batch sizes and the shapes of matrix products do not change a greedy token.
"""

from __future__ import annotations

import importlib.util

import pytest

from tests.engine.conftest import run_engine

pytestmark = pytest.mark.engine

_EAGER = {"enforce_eager": True, "dtype": "float32"}
_TOKENS = 40
_TIERS = ["exact", None] * 8
_METHODS = {
    "ngram": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1},
    "suffix": {"method": "suffix", "num_speculative_tokens": 4},
    "draft_model": {"method": "draft_model", "num_speculative_tokens": 3},
}


def _policy(demo_probes, **knobs) -> dict:
    from sedac.probe.manifest import read_manifest

    checkpoints = [{"layer": p.layer, "threshold": p.metrics["risk_q0.4"]} for p in read_manifest(demo_probes).probes]
    return {"do": "apply", "policy": {"enabled": True, "checkpoints": checkpoints, **knobs}}


def _sedac(demo_probes) -> dict:
    return {"probe_set": str(demo_probes), "levels": False}


def _tokens(results) -> list[list[int]]:
    return [r["tokens"] for r in results]


@pytest.fixture(scope="module")
def prompts(heldout_prompts) -> list[list[int]]:
    return heldout_prompts[:16]


@pytest.fixture(scope="module")
def plain(demo_model, prompts) -> list[list[int]]:
    """Greedy tokens of plain vLLM."""
    return _tokens(run_engine(demo_model, [{"do": "generate", "prompts": prompts, "max_tokens": _TOKENS}], **_EAGER)[0])


@pytest.fixture(scope="module")
def mixed(demo_model, demo_probes, prompts, plain) -> list[list[int]]:
    """Greedy tokens with SEDAC alone: every other request exact, the others bounded."""
    steps = [_policy(demo_probes), {"do": "generate", "prompts": prompts, "max_tokens": _TOKENS, "tiers": _TIERS}, {"do": "stats"}]
    _, results, stats = run_engine(demo_model, steps, sedac=_sedac(demo_probes), **_EAGER)
    tokens = _tokens(results)
    assert tokens[::2] == plain[::2]
    assert tokens[1::2] != plain[1::2], "the decisions must show"
    assert all(c["num_exited"] > 0 for c in stats["checkpoints"])
    return tokens


@pytest.mark.parametrize("method", _METHODS)
def test_speculation_changes_no_token(demo_model, demo_probes, prompts, plain, mixed, method):
    config = dict(_METHODS[method])
    if method == "suffix" and importlib.util.find_spec("arctic_inference") is None:
        pytest.skip("suffix speculation needs arctic-inference (pip install arctic-inference==0.1.1), which is not installed")
    if method == "draft_model":
        config |= {"model": str(demo_model)}
    steps = [
        _policy(demo_probes),
        {"do": "watch_steps"},
        {"do": "generate", "prompts": prompts, "max_tokens": _TOKENS, "tiers": _TIERS},
        {"do": "watched_steps"},
        {"do": "stats"},
        {"do": "counters"},
        *([{"do": "describe_draft"}] if method == "draft_model" else []),
    ]
    llm = {"speculative_config": config, "disable_log_stats": False, **_EAGER}
    _, _, results, watched, stats, counters, *draft = run_engine(demo_model, steps, sedac=_sedac(demo_probes), **llm)
    tokens = _tokens(results)
    assert tokens[::2] == plain[::2], "exact requests equal plain greedy decoding"
    assert tokens[1::2] == mixed[1::2], "bounded requests equal themselves without speculation"
    proposed, accepted = counters["vllm:spec_decode_num_draft_tokens"], counters["vllm:spec_decode_num_accepted_tokens"]
    assert 0 < accepted < proposed, "some drafts must be taken and some rejected"
    _check_rows(watched)
    assert stats["num_decode_tokens"] == sum(sum(step["decides"]) for step in watched)
    if method == "draft_model":
        assert draft == [{"class": "SedacQwen2ForCausalLM", "state": False, "touched": []}]


def _check_rows(watched) -> None:
    """Rows may be decided on exactly where a bounded request is past its prompt, by the positions that the model computes."""
    num_drafted = 0
    for step in watched:
        expected = []
        for i, (start, end) in enumerate(zip(step["bounds"], step["bounds"][1:], strict=False)):
            positions = step["positions"][start:end]
            num_drafted += len(positions) > 1 and positions[0] >= step["num_prompt"][i]
            expected += [step["bounded"][i] and position >= step["num_prompt"][i] for position in positions]
        assert step["decides"] == expected
    assert num_drafted > 0
