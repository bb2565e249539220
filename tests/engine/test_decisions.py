"""The gated model is right: engine against an independent forward pass, and tokens against their batch."""

from __future__ import annotations

import pytest
import torch

from tests.engine.reference import Reference
from tests.engine.running import EngineFailed, run_engine

pytestmark = pytest.mark.engine


def _thresholds(demo_probes, quantile: str) -> dict[int, float]:
    from sedac.probe.manifest import read_manifest

    return {p.layer: p.metrics[quantile] for p in read_manifest(demo_probes).probes}


def _policy(thresholds: dict[int, float], **knobs) -> dict:
    return {"enabled": True, "checkpoints": [{"layer": layer, "threshold": t} for layer, t in thresholds.items()], **knobs}


@pytest.mark.parametrize("eager", [True, pytest.param(False, marks=pytest.mark.thorough)], ids=["eager", "compiled"])
def test_logprobs_and_kv_equal_the_reference(demo_model, demo_probes, heldout_prompts, eager):
    thresholds = _thresholds(demo_probes, "risk_q0.4")
    prompts = heldout_prompts[:24]
    steps = [
        {"do": "apply", "policy": _policy(thresholds, phase="all")},
        {"do": "score", "prompts": prompts},
        {"do": "stats"},
        {"do": "read_kv", "prompt": prompts[0]},
    ]
    _, scored, stats, kv = run_engine(demo_model, steps, sedac={"probe_set": str(demo_probes)}, enforce_eager=eager, dtype="float32")
    reference = Reference(demo_model, demo_probes, thresholds)
    expected = [reference.score(prompt)[0] for prompt in prompts]
    assert all(count > 0 for count in reference.exit_layers.values()), f"some token must exit at each checkpoint: {reference.exit_layers}"
    # The token that vLLM generates after each prompt is never computed, so the engine saw exactly the prompts.
    assert {c["layer"]: c["num_exited"] for c in stats["checkpoints"]} == reference.exit_layers
    worst = max(abs(a - b) for ours, theirs in zip(scored, expected, strict=True) for a, b in zip(ours, theirs, strict=True))
    assert worst < 1e-4
    _, expected_kv = reference.score(prompts[0])
    assert reference.exited.any()
    for layer, ((key, value), (expected_key, expected_value)) in enumerate(zip(kv, expected_kv, strict=True)):
        torch.testing.assert_close(key, expected_key, atol=1e-3, rtol=1e-3, msg=f"keys of layer {layer}")
        torch.testing.assert_close(value, expected_value, atol=1e-3, rtol=1e-3, msg=f"values of layer {layer}")


def test_a_tokens_result_does_not_depend_on_its_batch(demo_model, demo_probes, heldout_prompts):
    policy = {"do": "apply", "policy": _policy(_thresholds(demo_probes, "risk_q0.2"))}
    steps = [
        policy,
        {"do": "generate", "prompts": heldout_prompts[:4], "batch": 1, "max_tokens": 48},
        {"do": "stats"},
        {"do": "generate", "prompts": heldout_prompts[:20], "max_tokens": 48},
    ]
    _, alone, stats, among = run_engine(demo_model, steps, sedac={"probe_set": str(demo_probes)}, enforce_eager=True, dtype="float32")
    assert 0 < stats["num_mlp_blocks_skipped"] < stats["num_mlp_blocks_computed"]
    assert [r["tokens"] for r in among[:4]] == [r["tokens"] for r in alone]


def test_thresholds_at_their_ends_and_prompts_in_full(demo_model, demo_probes, heldout_prompts):
    layers = sorted(_thresholds(demo_probes, "risk_q0.2"))
    prompts, max_tokens = heldout_prompts[:8], 16
    generate = {"do": "generate", "prompts": prompts, "max_tokens": max_tokens}
    steps = [
        {"do": "apply", "policy": _policy(dict.fromkeys(layers, 0.0)), "revision": 1},
        generate,
        {"do": "stats"},
        {"do": "apply", "policy": _policy(dict.fromkeys(layers, 1e9)), "revision": 2},
        generate,
        {"do": "stats"},
        {"do": "apply", "policy": _policy({layers[0]: -1.0}), "revision": 3},
        {"do": "stats"},
    ]
    _, _, zero, _, _, high, refused, after = run_engine(demo_model, steps, sedac={"probe_set": str(demo_probes)}, enforce_eager=True)
    assert all(c["num_exited"] == 0 for c in zero["checkpoints"])
    # Of max_tokens new tokens the last is never fed back; the first comes from the prompt's last position.
    num_decode = len(prompts) * (max_tokens - 1)
    assert zero["num_decode_tokens"] == num_decode
    assert high["num_decode_tokens"] == 2 * num_decode
    assert [c["num_exited"] for c in high["checkpoints"]] == [num_decode, *[0] * (len(layers) - 1)]
    assert high["num_torn_steps"] == 0
    assert refused[0]["revision"] == 2
    assert refused[0]["violations"][0][0] == "checkpoints[0].threshold"
    assert after["active_revision"] == 2


def test_missing_probe_is_refused_by_name(demo_model, demo_probes):
    with pytest.raises(EngineFailed, match=r"SEDAC probe missing for layer 7: .*probes\.safetensors"):
        run_engine(demo_model, [], sedac={"probe_set": str(demo_probes), "checkpoint_layers": [7]}, enforce_eager=True)
