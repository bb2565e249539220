"""SEDAC beside vLLM's other features: what works equals the same run without the feature, what does not is refused by name.

Everything in fp32, where batch sizes and the shapes of matrix products do not change a greedy token.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.engine.running import DEMO, EngineFailed, run_engine

pytestmark = pytest.mark.engine

_EAGER = {"enforce_eager": True, "dtype": "float32"}
_TOKENS = 32
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


@pytest.mark.parametrize("method", ["ngram", *(pytest.param(method, marks=pytest.mark.thorough) for method in ("suffix", "draft_model"))])
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


def test_speculation_keeps_the_distribution_at_a_temperature(demo_model, demo_probes, prompts):
    """vLLM's CPU sampler loses the temperature of draft tokens; the worker repairs it (engine/vllm/sampling.py)."""
    copies = [prompts[0] * 2] * 512
    run = {"do": "generate", "prompts": copies, "max_tokens": 3, "temperature": 0.7}
    first, second = run_engine(demo_model, [run, run | {"seed": 10_000}], **_EAGER)
    llm = {"speculative_config": _METHODS["ngram"], "disable_log_stats": False, **_EAGER}
    exact = run | {"tiers": ["exact"] * len(copies), "seed": 20_000}
    _, drafted, counters = run_engine(demo_model, [_policy(demo_probes), exact, {"do": "counters"}], sedac=_sedac(demo_probes), **llm)
    assert counters["vllm:spec_decode_num_draft_tokens"] > 512
    chance = _get_distance(first, second)
    assert _get_distance(drafted, first) < 1.25 * chance + 0.02, "0.30 without the repair, where chance alone is 0.16"


def _get_distance(ours, theirs) -> float:
    """Total variation between the distributions of the last token."""
    counts = [Counter(result["tokens"][-1] for result in results) for results in (ours, theirs)]
    return sum(abs(counts[0][t] - counts[1][t]) for t in counts[0] | counts[1]) / 2 / len(ours)


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


def test_chunked_prefill_and_prefix_cache_change_no_token(demo_model, demo_probes, prompts, plain, mixed):
    """Prompts in pieces of at most 48 tokens beside decoding; exact requests after bounded ones read none of their KV."""
    run = {"do": "generate", "prompts": prompts, "max_tokens": _TOKENS}
    shared = [prompts[0] * 4 + p for p in prompts[:4]]
    again = {"do": "generate", "prompts": shared, "max_tokens": 16}
    loud = _policy(demo_probes, phase="all")  # every token exits at once, so that what it leaves in the cache can't be missed
    loud["policy"]["checkpoints"] = [c | {"threshold": 1e9} for c in loud["policy"]["checkpoints"]]
    steps = [
        _policy(demo_probes),
        run | {"tiers": _TIERS},
        loud | {"revision": 2},
        {"do": "reset_prefix_cache"},
        again | {"salt": "sedac-bounded:balanced:"},
        again | {"tiers": ["exact"] * 4},
        {"do": "reset_prefix_cache"},
        again,
        again | {"tiers": ["exact"] * 4},
        {"do": "counters"},
    ]
    llm = {"enable_prefix_caching": True, "block_size": 32, "max_num_batched_tokens": 48, "max_num_seqs": 16, "disable_log_stats": False, **_EAGER}
    _, pieces, _, _, bounded, exact, _, _, unsalted, counters = run_engine(demo_model, steps, sedac=_sedac(demo_probes), **llm)
    assert _tokens(pieces) == mixed
    expected = _tokens(run_engine(demo_model, [again], **_EAGER)[0])
    assert _tokens(bounded) != expected, "what the bounded requests wrote must be different"
    assert counters["vllm:prefix_cache_hits"] > 0, "the cache must have been read"
    assert _tokens(exact) == expected
    assert _tokens(unsalted) != expected, "without salts the cache must show, else this test proves nothing"


def test_preemption_changes_no_token(demo_model, demo_probes, prompts, mixed):
    steps = [_policy(demo_probes), {"do": "generate", "prompts": prompts, "max_tokens": _TOKENS, "tiers": _TIERS}, {"do": "counters"}]
    llm = {"num_gpu_blocks_override": 12, "block_size": 32, "max_model_len": 256, "disable_log_stats": False, **_EAGER}
    _, results, counters = run_engine(demo_model, steps, sedac=_sedac(demo_probes), **llm)
    assert counters["vllm:num_preemptions"] > 0
    assert _tokens(results) == mixed


def _make_adapter(directory: Path, seed: int) -> str:
    """Write a random LoRA adapter for the demo model, large enough to change its tokens."""
    from safetensors.torch import save_file

    config = json.loads((DEMO / "model" / "config.json").read_text())
    hidden, inner, rank = config["hidden_size"], config["intermediate_size"], 8
    sizes = {"self_attn.q_proj": (hidden, hidden), "mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner), "mlp.down_proj": (inner, hidden)}
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (num_inputs, num_outputs) in sizes.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(rank, num_inputs, generator=generator) / num_inputs**0.5
            weights[f"{prefix}.lora_B.weight"] = torch.randn(num_outputs, rank, generator=generator) * 0.1
    directory.mkdir()
    save_file(weights, directory / "adapter_model.safetensors")
    targets = [name.split(".")[-1] for name in sizes]
    adapter = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": targets, "bias": "none", "task_type": "CAUSAL_LM"}
    (directory / "adapter_config.json").write_text(json.dumps(adapter))
    return str(directory)


def test_lora_adapters_in_one_batch(demo_model, demo_probes, prompts, plain, tmp_path):
    adapters = [_make_adapter(tmp_path / "first", 1), _make_adapter(tmp_path / "second", 2)]
    llm = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8, **_EAGER}
    # No request without an adapter among them: on the CPU vLLM gives it the last adapter's (lora/ops/torch_ops/lora_ops.py, 0.32: index -1).
    chosen = [adapters[i // 2 % 2] for i in range(16)]  # with _TIERS: each adapter exact and bounded
    run = {"do": "generate", "prompts": prompts, "max_tokens": _TOKENS, "adapters": chosen}
    expected = _tokens(run_engine(demo_model, [run], **llm)[0])
    assert sum(ours != theirs for ours, theirs in zip(expected, plain, strict=True)) > 12, "the adapters must show"
    steps = [_policy(demo_probes), run | {"tiers": _TIERS}, run | {"batch": 8}, run, {"do": "stats"}]
    _, mixed, alone, together, stats = run_engine(demo_model, steps, sedac=_sedac(demo_probes), **llm)
    assert _tokens(mixed)[::2] == expected[::2], "exact requests equal plain vLLM with their adapter"
    assert _tokens(mixed)[1::2] == _tokens(together)[1::2], "a bounded request does not depend on its neighbours' tier"
    assert _tokens(alone) == _tokens(together)
    assert sum(ours != theirs for ours, theirs in zip(_tokens(together), expected, strict=True)) > 4
    assert all(c["num_exited"] > 0 for c in stats["checkpoints"])


def _make_levels(demo_probes, directory: Path) -> Path:
    """Copy the demo probes into a probe set with one level of each reduction, ordered at random."""
    from sedac.probe import artifact
    from sedac.probe.levels import Level, Neurons
    from sedac.probe.manifest import LevelRecord, Manifest, read_manifest

    source = read_manifest(demo_probes)
    config = json.loads((DEMO / "model" / "config.json").read_text())
    num_layers, size = config["num_hidden_layers"], config["intermediate_size"]
    records = (
        LevelRecord(name="some", reduction="contextual", saved=0.4, perplexity_ratio=1.0),
        LevelRecord(name="half", reduction="width", saved=0.5, perplexity_ratio=1.0),
    )
    levels = (
        Level(name="some", reduction="contextual", parameters_L=torch.full((num_layers,), 0.3)),
        Level(name="half", reduction="width", parameters_L=torch.full((num_layers,), size // 2, dtype=torch.int32)),
    )
    generator = torch.Generator().manual_seed(3)
    neurons = {
        i: Neurons(order_F=torch.randperm(size, generator=generator).int(), scale_F=torch.rand(size, generator=generator) + 0.5, repair_FD=None)
        for i in range(num_layers)
    }
    manifest = Manifest(
        name="levels", model=source.model, hidden_size=source.hidden_size, num_layers=num_layers, rank=source.rank, target=source.target,
        probes=source.probes, intermediate_size=size, activation="silu", score="gate", levels=records,
    )  # fmt: skip
    artifact.save(directory, manifest, artifact.load(demo_probes, None).probes, levels=levels, neurons=neurons)
    return directory


@pytest.fixture(scope="module")
def levelled_probes(demo_probes, tmp_path_factory) -> Path:
    return _make_levels(demo_probes, tmp_path_factory.mktemp("composition") / "levels")


def test_reduced_levels_and_lora_are_refused(demo_model, levelled_probes):
    with pytest.raises(EngineFailed, match=r"UnsupportedModel: the probe set's reduced levels and LoRA can't be combined .*SEDAC_LEVELS=0"):
        run_engine(demo_model, [], sedac={"probe_set": str(levelled_probes)}, enable_lora=True, max_lora_rank=8, **_EAGER)


@pytest.mark.thorough
def test_tensor_parallel_ranks_decide_alike(demo_model, demo_probes, levelled_probes, prompts):
    tiers = [{"name": "skipping"}, {"name": "some", "level": "some"}, {"name": "half", "level": "half", "floor": "some"}]
    names = ["exact", *(t["name"] for t in tiers)]
    policy = _policy(demo_probes, tiers=tiers, default_tier="skipping")
    run = {"do": "generate", "prompts": prompts, "max_tokens": _TOKENS, "tiers": names * 4, "logprobs": 0}
    steps = [policy, run, {"do": "worker_stats"}, {"do": "worker_risks"}]
    _, alone, (total,), _ = run_engine(demo_model, steps, sedac={"probe_set": str(levelled_probes)}, **_EAGER)
    _, shared, ranks, risks = run_engine(demo_model, steps, sedac={"probe_set": str(levelled_probes)}, tensor_parallel_size=2, **_EAGER)
    assert len(ranks) == 2
    assert [r["checkpoints"] for r in ranks] == [total["checkpoints"]] * 2
    assert [[(t["num_tokens"], t["num_exited"]) for t in r["tiers"]] for r in ranks] == [
        [(t["num_tokens"], t["num_exited"]) for t in total["tiers"]]
    ] * 2
    assert torch.isfinite(risks[0]).any()
    assert torch.equal(risks[0].nan_to_num(-1), risks[1].nan_to_num(-1)), "the ranks' risks must be the same to the last bit"
    assert _tokens(shared) == _tokens(alone)
    assert all(c["num_exited"] > 0 for c in total["checkpoints"])
    for ours, theirs in zip(shared, alone, strict=True):
        assert ours["logprobs"] == pytest.approx(theirs["logprobs"], abs=1e-3)


def _quantise(directory: Path) -> Path:
    """Write the demo model with int8 weights per channel and dynamic int8 activations per token (compressed-tensors)."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(DEMO / "model", directory)
    weights, quantised = load_file(directory / "model.safetensors"), {}
    for name, weight in weights.items():
        if not name.endswith("_proj.weight"):
            quantised[name] = weight
            continue
        scale = weight.float().abs().amax(1, keepdim=True) / 127
        quantised[name] = (weight.float() / scale).round().clamp(-127, 127).to(torch.int8)
        quantised[f"{name}_scale"] = scale
    save_file(quantised, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    integer = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**integer, "strategy": "channel", "dynamic": False},
        "input_activations": {**integer, "strategy": "token", "dynamic": True},
    }
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_quantised_model_exits_and_refuses_levels(demo_probes, levelled_probes, prompts, plain, tmp_path):
    model = _quantise(tmp_path / "w8a8")
    eager = _EAGER | ({"dtype": "bfloat16"} if torch.cpu._is_amx_tile_supported() else {})  # vLLM's int8 product for AMX takes no fp32
    run = {"do": "generate", "prompts": prompts, "max_tokens": _TOKENS}
    expected = _tokens(run_engine(model, [run], **eager)[0])
    assert expected != plain, "the quantisation must show"
    steps = [_policy(demo_probes), run | {"tiers": _TIERS}, run | {"batch": 8}, run, {"do": "stats"}]
    _, mixed, alone, together, stats = run_engine(model, steps, sedac=_sedac(demo_probes), **eager)
    assert _tokens(mixed)[::2] == expected[::2], "exact requests equal plain vLLM on the same quantised model"
    assert _tokens(mixed)[1::2] == _tokens(together)[1::2]
    assert _tokens(alone) == _tokens(together)
    assert _tokens(together) != expected
    assert all(c["num_exited"] > 0 for c in stats["checkpoints"])
    refusal = r"UnsupportedModel: model\.layers\.0\.mlp is quantised \(CompressedTensorsLinearMethod\).*SEDAC_LEVELS=0"
    with pytest.raises(EngineFailed, match=refusal):
        run_engine(model, [], sedac={"probe_set": str(levelled_probes)}, **eager)
