"""Greedy answers with SEDAC's own drafts are plain vLLM's, token for token, whatever shares the batch and whatever the knobs do meanwhile.

In fp32, where batch sizes do not change a greedy token; in bf16 they do, and drafts may not change more. SEDAC_TEST_FULL=1 runs 256
prompts and 128 tokens instead of 32 and 64; `pytest -rP` shows the figures.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.engine.running import DRAFTER, TORCH_DRAFTS, read_heldout_prompts, run_engine, speculation

pytestmark = [pytest.mark.engine, pytest.mark.timeout(3600)]

FULL = os.environ.get("SEDAC_TEST_FULL") == "1"
_NUM_PROMPTS, _TOKENS = (256, 128) if FULL else (32, 64)
_FP32 = {"dtype": "float32", "max_model_len": 256}
_KNOBS = {"max_tokens": _TOKENS, "detokenize": False}
_CROWDED = {
    "enable_prefix_caching": True, "block_size": 32, "max_num_batched_tokens": 64, "max_num_seqs": 16, "num_gpu_blocks_override": 40 if FULL else 28,
}  # fmt: skip
"""prompts come in pieces, blocks are too few for 16 sequences, and 16 sequences with 4 draft tokens each are too many for a step"""


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return read_heldout_prompts(_NUM_PROMPTS)


def _tokens(results) -> list[list[int]]:
    return [r["tokens"] for r in results]


def _run(demo_model, demo_probes, draft: Path, steps, **llm):
    sedac = {"probe_set": str(demo_probes), "draft": str(draft)}
    return run_engine(demo_model, steps, sedac=sedac, speculative_config=DRAFTER, disable_log_stats=False, **llm)


@pytest.mark.parametrize(
    ("kind", "eager", "native"),
    [
        ("adapter", True, True),
        ("reduced", True, True),
        *(pytest.param(kind, True, native, marks=pytest.mark.thorough) for kind, native in (("exit-head", True), ("reduced", False))),
        *(pytest.param(kind, False, native, marks=pytest.mark.thorough) for kind in ("adapter", "exit-head", "reduced") for native in (True, False)),
    ],
)
def test_batches_of_1_4_16_beside_chunks_cached_prefixes_and_preemption(demo_model, demo_probes, drafts, prompts, kind, eager, native):
    """Draft passes as one native operator, in torch, and compiled."""
    plain = _tokens(run_engine(demo_model, [{"do": "answer", "prompts": prompts, "knobs": _KNOBS}], enforce_eager=eager, **_FP32)[0])
    run = {"do": "answer", "prompts": prompts, "knobs": _KNOBS}
    steps = [speculation(), run | {"groups": [1, 4, 16]}, {"do": "stats"}, run | {"groups": [16, 1, 4]}, {"do": "counters"}, {"do": "stats"}]
    steps.append({"do": "drafts_natively"})
    before = () if native else TORCH_DRAFTS
    results = _run(demo_model, demo_probes, drafts[kind], steps, before=before, enforce_eager=eager, **_FP32, **_CROWDED)
    _, first, cold, second, counters, stats, is_native = results
    assert is_native == native
    for results in (first, second):
        assert _tokens(results) == plain
    drafting = stats["drafting"]
    print(f"{kind}: {drafting['num_drafted']} drafted, {drafting['num_accepted']} accepted, lengths {drafting['lengths']}")
    print(f"{counters['vllm:num_preemptions']} preemptions, {counters['vllm:prefix_cache_hits']} cached tokens")
    assert 0 < drafting["num_accepted"] < drafting["num_drafted"]
    assert all(drafting["lengths"]), "sequences must stop drafting at every length"
    assert cold["drafting"]["num_drafted"] < drafting["num_drafted"]
    assert counters["vllm:num_preemptions"] > 0
    assert counters["vllm:prefix_cache_hits"] > 0


def test_everything_accepted(demo_model, demo_probes, drafts, prompts):
    """A draft with nothing left out proposes what the model says: all of its tokens are accepted, up to the end of each answer."""
    plain = _tokens(run_engine(demo_model, [{"do": "answer", "prompts": prompts, "knobs": _KNOBS}], enforce_eager=True, **_FP32)[0])
    steps = [speculation(min_confidence=0.0), {"do": "answer", "prompts": prompts[:16], "knobs": _KNOBS}, {"do": "stats"}]
    _, results, stats = _run(demo_model, demo_probes, drafts["whole"], steps, enforce_eager=True, **_FP32)
    assert _tokens(results) == plain[:16]
    drafting = stats["drafting"]
    assert drafting["num_accepted"] == drafting["num_drafted"] > 0
    # one token from the prompt, then five at a time
    assert drafting["num_verified_steps"] == 16 * -(-(_TOKENS - 1) // 5)


@pytest.mark.parametrize(
    ("num_prompts", "max_tokens"), [(8, 16), *(pytest.param(*size, marks=pytest.mark.thorough) for size in ((16, 32), (_NUM_PROMPTS, _TOKENS)))]
)
def test_bfloat16_differs_no_more_than_plain_vllm_between_batch_sizes(demo_model, demo_probes, drafts, prompts, num_prompts, max_tokens):
    prompts = prompts[:num_prompts]
    run = {"do": "answer", "prompts": prompts, "knobs": _KNOBS | {"max_tokens": max_tokens}}
    groups = ([1], [4], [16])
    llm = {"enforce_eager": True, "dtype": "bfloat16", "max_model_len": 256}
    plain = [_tokens(r) for r in run_engine(demo_model, [run | {"groups": g} for g in groups], **llm)]
    steps = [speculation(), *(run | {"groups": g} for g in groups)]
    drafted = [_tokens(r) for r in _run(demo_model, demo_probes, drafts["adapter"], steps, **llm)[1:]]
    own = [_get_differing(plain[i], plain[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    ours = [_get_differing(mine, theirs) for mine in drafted for theirs in plain]
    for name, pairs in (("plain vLLM between batch sizes 1, 4, 16", own), ("drafted at 1, 4, 16 against plain at 1, 4, 16", ours)):
        print(f"{name}: {', '.join(f'{tokens:.4f} of the tokens in {answers:.3f} of the answers' for tokens, answers in pairs)}")
    answers = sum(a for _, a in own) / len(own)
    error = (max(answers, 1 / len(prompts)) * (1 - answers) / len(prompts)) ** 0.5
    assert sum(a for _, a in ours) / len(ours) <= answers + 2 * error
    assert max(t for t, _ in ours) < 0.5


def _get_differing(ours, theirs) -> tuple[float, float]:
    """Share of differing tokens, and of answers that differ anywhere."""
    tokens = sum(a != b for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=True))
    return tokens / sum(map(len, ours)), sum(a != b for a, b in zip(ours, theirs, strict=True)) / len(ours)


_TIERS = ["exact", "exact", "balanced", "deep"]
_SPECULATES = [True, False, True, True]


@pytest.fixture(scope="module")
def mixed(prompts) -> list[dict]:
    """Sampling parameters of 16 requests: exact with and without speculation, and two bounded tiers."""
    return [_KNOBS | {"tier": _TIERS[i % 4], "speculation": _SPECULATES[i % 4]} for i in range(16)]


def _policy(demo_probes, **knobs) -> dict:
    from sedac.probe.manifest import read_manifest

    checkpoints = [{"layer": p.layer, "threshold": p.metrics["risk_q0.4"]} for p in read_manifest(demo_probes).probes]
    tiers = [{"name": "balanced"}, {"name": "deep", "level": "skip", "floor": "contextual-40"}]
    return {"enabled": True, "checkpoints": checkpoints, "tiers": tiers, "speculation": {"adaptive": False, **knobs}}


def test_mixed_traffic_in_one_batch_is_each_as_its_own_run(demo_model, demo_probes, drafts, prompts, mixed):
    policy = {"do": "apply", "policy": _policy(demo_probes)}
    run = {"do": "answer", "prompts": prompts[:16], "knobs": mixed}
    plain = _tokens(run_engine(demo_model, [{"do": "answer", "prompts": prompts, "knobs": _KNOBS}], enforce_eager=True, **_FP32)[0])
    undrafted = run_engine(demo_model, [policy, run], sedac={"probe_set": str(demo_probes)}, enforce_eager=True, **_FP32)[1]

    changes = [
        _policy(demo_probes, max_tokens=1), _policy(demo_probes, enabled=False), _policy(demo_probes, min_confidence=0.9),
        _policy(demo_probes, tiers=["exact"]), _policy(demo_probes, adaptive=True), _policy(demo_probes, max_tokens=4, min_confidence=0.0),
    ]  # fmt: skip
    between = {"do": "generate_between", "run": "answer", "changes": [{"policy": p, "revision": i} for i, p in enumerate(changes)]}
    steps = [
        {"do": "watch_drafts"}, policy, run | {"groups": [1]}, run, {"do": "stats"},
        run | between, {"do": "stats"},
        {"do": "apply", "policy": _policy(demo_probes, enabled=False), "revision": 20}, run, {"do": "stats"},
        {"do": "apply", "policy": _policy(demo_probes, tiers=["balanced"]), "revision": 21}, run,
    ]  # fmt: skip
    results = _run(demo_model, demo_probes, drafts["reduced"], steps, enforce_eager=True, **_FP32)
    _, _, alone, together, once, swapped, before, _, off, after, _, tiered = results
    expected = _tokens(undrafted)
    for i in range(16):
        if _TIERS[i % 4] == "exact":
            assert expected[i] == plain[i]
    assert [e != p for e, p in zip(expected, plain[:16], strict=True)].count(True) >= 4, "bounded tiers must show"
    for name, run_results in (("alone", alone), ("together", together), ("while knobs change", swapped["results"]), ("off", off), ("tiered", tiered)):
        assert _tokens(run_results) == expected, name

    for run_results in (alone, together):
        assert [r["num_drafted"] > 0 for r in run_results] == _SPECULATES * 4
    assert once["drafting"]["num_accepted"] > 0
    assert len(swapped["answers"]) >= len(changes)
    assert not any(answer["violations"] for answer in swapped["answers"])
    assert before["drafting"]["num_drafted"] > once["drafting"]["num_drafted"]
    assert after["drafting"]["num_drafted"] == before["drafting"]["num_drafted"]
    assert after["drafting"]["num_passes"] == before["drafting"]["num_passes"]
    assert not any(r["num_drafted"] for r in off)
    assert [r["num_drafted"] > 0 for r in tiered] == [False, False, True, False] * 4
    assert after["num_torn_steps"] == 0
