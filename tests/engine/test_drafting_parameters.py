"""Sampling parameters beside SEDAC's own drafts: log-probabilities, stops, lengths, grammars, bans and penalties as without speculation.

One batch of greedy requests, each with a parameter of its own, in plain vLLM and with drafts; in fp32.
"""

from __future__ import annotations

import json
import re

import pytest

from tests.engine.running import DRAFTER, run_engine, speculation

pytestmark = pytest.mark.engine

_LLM = {
    "enforce_eager": True, "dtype": "float32", "max_model_len": 256,
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},  # else the model fills its answers with spaces
}  # fmt: skip
_TAGS = {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2}
_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "size": {"type": "integer", "maximum": 9999}, "tags": _TAGS},
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}  # fmt: skip
_REGEX = r"(return|yield) [a-z_]{3,12}\([0-9]{1,4}\)"
_CASES: dict[str, dict] = {
    "nothing": {},
    "logprobs": {"logprobs": 5},
    "prompt_logprobs": {"prompt_logprobs": 2, "logprobs": 1},
    "stop": {"stop": ["self", "return", "\n\n"]},
    "stop_included": {"stop": ["):", "= "], "include_stop_str_in_output": True},
    "max_tokens_1": {"max_tokens": 1},
    "max_tokens_2": {"max_tokens": 2},
    "max_tokens_7": {"max_tokens": 7},
    "bad_words": {"bad_words": ["self", "return", " =", "(", " in", " if"]},
    "repetition": {"repetition_penalty": 1.5},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 1.0, "logprobs": 1},
    "top_k_1": {"temperature": 0.9, "top_k": 1, "seed": 3},
    "json": {"structured_outputs": {"json": _SCHEMA}, "max_tokens": 60, "ignore_eos": False},
    "regex": {"structured_outputs": {"regex": _REGEX}, "max_tokens": 60, "ignore_eos": False},
    "logit_bias": {"logit_bias": {"17": 6.0, "260": 5.0}},
    "speculation_off": {"speculation": False},
}
_NUM_PROMPTS, _TOKENS = 3, 40
_SHORT = {"max_tokens_1", "max_tokens_2"}
"""too few tokens for many drafts"""
_UNDRAFTED = {"max_tokens_1", "max_tokens_2", "logit_bias", "speculation_off"}


@pytest.fixture(scope="module")
def cases(heldout_prompts, demo_model) -> dict[str, dict]:
    """The cases, with those that need token ids: stops and allowed ids that occur in the answers."""
    run = {"do": "answer", "prompts": heldout_prompts[:_NUM_PROMPTS], "knobs": {"max_tokens": _TOKENS}}
    answers = [r["tokens"] for r in run_engine(demo_model, [run], **_LLM)[0]]
    stops = sorted({tokens[i] for tokens in answers for i in (6, 11, 17, 25)})
    return _CASES | {
        "stop_ids": {"stop_token_ids": stops},
        "min_tokens": {"stop_token_ids": stops, "min_tokens": 22},
        "allowed": {"allowed_token_ids": sorted(set(range(0, 4096, 2)) | {answers[0][0]})},
    }


@pytest.fixture(scope="module")
def answers(demo_model, demo_probes, drafts, heldout_prompts, cases) -> dict[str, tuple[list[dict], list[dict]]]:
    """Per case, plain vLLM's answers and those with drafts."""
    prompts = heldout_prompts[:_NUM_PROMPTS] * len(cases)
    knobs = [{"max_tokens": _TOKENS, **case} for case in cases.values() for _ in range(_NUM_PROMPTS)]
    run = {"do": "answer", "prompts": prompts, "knobs": knobs}
    plain = run_engine(demo_model, [run], max_num_seqs=24, **_LLM)[0]
    sedac = {"probe_set": str(demo_probes), "draft": str(drafts["reduced"])}
    steps = [{"do": "watch_drafts"}, speculation(), run]
    drafted = run_engine(demo_model, steps, sedac=sedac, speculative_config=DRAFTER, max_num_seqs=24, **_LLM)[2]
    return {
        name: (plain[i * _NUM_PROMPTS : (i + 1) * _NUM_PROMPTS], drafted[i * _NUM_PROMPTS : (i + 1) * _NUM_PROMPTS]) for i, name in enumerate(cases)
    }


@pytest.mark.parametrize("name", [*_CASES, "stop_ids", "min_tokens", "allowed"])
def test_answers_are_plain_vllms(answers, name):
    plain, drafted = answers[name]
    for theirs, ours in zip(plain, drafted, strict=True):
        assert (ours["tokens"], ours["text"], ours["finish"]) == (theirs["tokens"], theirs["text"], theirs["finish"])
        for part in ("logprobs", "prompt_logprobs"):
            assert (ours[part] is None) == (theirs[part] is None)
            for mine, other in zip(ours[part] or [], theirs[part] or [], strict=True):
                assert mine == (other and pytest.approx(other, abs=1e-3))
        assert (ours["num_drafted"] == 0) == (name in _UNDRAFTED), ours["num_drafted"]


def test_every_parameter_shows(answers):
    """Else equal answers would prove nothing."""
    usual = [r["tokens"] for r in answers["nothing"][0]]
    for name, (plain, _) in answers.items():
        tokens = [r["tokens"] for r in plain]
        if name in ("nothing", "logprobs", "prompt_logprobs", "top_k_1", "speculation_off"):
            assert tokens == usual, name
        else:
            assert tokens != usual, name
    assert all(r["logprobs"] and len(r["logprobs"]) == len(r["tokens"]) for r in answers["logprobs"][1])
    assert all(len(r["prompt_logprobs"]) > 20 for r in answers["prompt_logprobs"][1])
    assert any(r["finish"][0] == "stop" and len(r["tokens"]) > 4 for r in answers["stop"][1])
    assert [len(r["tokens"]) for r in answers["max_tokens_7"][1]] == [7] * _NUM_PROMPTS
    assert all(len(r["tokens"]) >= 22 for r in answers["min_tokens"][1])
    assert any(len(r["tokens"]) < 22 for r in answers["stop_ids"][1])


def test_grammars_hold(answers):
    for result in answers["regex"][1]:
        assert re.fullmatch(_REGEX, result["text"]), result["text"]
    finished = [r for r in answers["json"][1] if r["finish"][0] == "stop"]
    assert finished
    for result in finished:
        assert set(json.loads(result["text"])) == {"name", "size", "tags"}
