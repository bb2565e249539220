"""Reduced levels and tiers in the engine: against an independent forward pass, in mixed batches, and adapted online."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch
from sedac.probe import artifact
from sedac.probe.levels import Level, Neurons, reduce_mlp
from sedac.probe.manifest import LevelRecord, Manifest
from transformers import AutoModelForCausalLM

from tests.engine.conftest import run_engine

pytestmark = pytest.mark.engine

TIERS = [
    {"name": "conservative", "floor": "contextual-20", "level": "contextual-20"},
    {"name": "balanced", "floor": "contextual-20", "level": "width-40"},
    {"name": "aggressive", "floor": "width-40", "level": "skip"},
]


@functools.cache
def load_model(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def level_set(tmp_path_factory, demo_model, demo_probes, heldout_prompts) -> Path:
    return add_levels(tmp_path_factory.mktemp("probe-set"), demo_model, demo_probes, heldout_prompts[0])


def add_levels(directory, model_directory, probe_set, prompt) -> Path:
    """A probe set's probes with two levels of our own: thresholds at the gates' medians, neurons in a random order, layer 0 whole."""
    model, gates = load_model(model_directory), {}
    hooks = [
        layer.mlp.gate_proj.register_forward_hook(lambda m, i, out, n=n: gates.__setitem__(n, out.abs().flatten()))
        for n, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(torch.tensor([prompt]))
    for hook in hooks:
        hook.remove()
    bare = artifact.load(probe_set)
    size, depth = model.config.intermediate_size, model.config.num_hidden_layers
    generator = torch.Generator().manual_seed(5)
    contextual = torch.tensor([0.0] + [gates[n].quantile(0.4).item() for n in range(1, depth)])
    width = torch.tensor([size] + [round(0.6 * size)] * (depth - 1), dtype=torch.int32)
    neurons = {n: Neurons(order_F=torch.randperm(size, generator=generator).int(), scale_F=torch.ones(size), repair_FD=None) for n in range(depth)}
    levels = (
        Level(name="contextual-20", reduction="contextual", parameters_L=contextual),
        Level(name="width-40", reduction="width", parameters_L=width),
    )
    records = (
        LevelRecord(name="contextual-20", reduction="contextual", saved=0.24, perplexity_ratio=1.0),
        LevelRecord(name="width-40", reduction="width", saved=0.37, perplexity_ratio=1.0),
    )
    manifest = Manifest(
        **{**vars(bare.manifest), "name": "levels", "intermediate_size": size, "activation": "silu", "score": "gate", "levels": records, "tiers": ()}
    )
    artifact.save(directory, manifest, bare.probes, levels=levels, neurons=neurons)
    return directory


class Reference:
    """A transformers model with floor and goal written out: every MLP row by the naive reduction of its token's level."""

    def __init__(self, model: Path, level_set: Path, thresholds: dict[int, float], floor: str, goal: str) -> None:
        self.model = load_model(model)
        self.set = artifact.load(level_set)
        self.levels = {level.name: level for level in self.set.levels}
        self.thresholds, self.floor, self.goal = thresholds, floor, goal
        self.num_blocks = 0.0
        """MLPs of single tokens computed by `score`, a reduced one by its share; the last token of each call is not counted"""

    @torch.no_grad()
    def score(self, tokens: list[int], num_full: int = 0) -> list[float]:
        """Log-probabilities of every token but the first; the first `num_full` tokens in full."""
        model = self.model
        level = [self.floor if t >= num_full else "full" for t in range(len(tokens))]
        hooks = []
        for n, layer in enumerate(model.model.layers):
            hooks.append(layer.mlp.register_forward_hook(functools.partial(self._reduce, n, level)))
            if n in self.thresholds:
                hooks.append(layer.register_forward_hook(functools.partial(self._decide, n, level, num_full)))
        logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        for hook in hooks:
            hook.remove()
        return logprobs[:-1].gather(1, torch.tensor(tokens)[1:, None])[:, 0].tolist()

    def _reduce(self, n, level, module, inputs, output):
        out, shares = output.clone(), []
        for t, name in enumerate(level):
            share = float(name != "skip")
            if name == "skip":
                out[0, t] = 0
            elif name != "full":
                weights = (module.gate_proj.weight, module.up_proj.weight, module.down_proj.weight)
                y, shared = reduce_mlp(inputs[0][0, t : t + 1], *weights, level=self.levels[name], layer=n, neurons=self.set.neurons[n])
                out[0, t], share = y[0], shared.item()
            shares.append(share)
        self.num_blocks += sum(shares[:-1])
        return out

    def _decide(self, n, level, num_full, module, inputs, output):
        stream = (output[0] if isinstance(output, tuple) else output)[0]
        for t, risk in enumerate(self.set.probes[n](stream).tolist()):
            if t >= num_full and level[t] == self.floor and risk < self.thresholds[n]:
                level[t] = self.goal


def _policy(demo_probes, quantile="risk_q0.4", **knobs):
    from sedac.probe.manifest import read_manifest

    thresholds = {p.layer: p.metrics[quantile] for p in read_manifest(demo_probes).probes}
    return thresholds, {"enabled": True, "checkpoints": [{"layer": n, "threshold": t} for n, t in thresholds.items()], **knobs}


@pytest.mark.parametrize("eager", [True, pytest.param(False, marks=pytest.mark.thorough)], ids=["eager", "compiled"])
def test_levels_equal_the_reference(demo_model, demo_probes, heldout_prompts, level_set, eager):
    prompts = [p[:40] for p in heldout_prompts[:4]]
    steps = make_level_steps(demo_probes, prompts)
    results = run_engine(demo_model, steps, sedac={"probe_set": str(level_set)}, enforce_eager=eager, dtype="float32")
    check_levels(demo_model, level_set, prompts, results)


def make_level_steps(probe_set: Path, prompts: list[list[int]]) -> list[dict]:
    """Prompts in full or reduced, a few rows at a time (native kernels) or many (masked)."""
    _, everything = _policy(probe_set, phase="all", tiers=TIERS)
    return [
        {"do": "apply", "policy": everything, "revision": 1},
        {"do": "score", "prompts": prompts},
        {"do": "apply", "policy": {**everything, "phase": "decode", "default_tier": "aggressive"}, "revision": 2},
        {"do": "generate", "prompts": prompts, "batch": 1, "max_tokens": 24, "logprobs": 0},
        {"do": "stats"},
    ]


def check_levels(model: Path, level_set: Path, prompts: list[list[int]], results: list, max_share: float = 0.8) -> None:
    """Hold what these steps gave against the reference: log-probabilities, and what was computed, at most `max_share` in the lowest tier."""
    thresholds, _ = _policy(level_set)
    _, scored, _, generated, stats = results
    pairs = []
    balanced = Reference(model, level_set, thresholds, "contextual-20", "width-40")
    for prompt, found in zip(prompts, scored, strict=True):
        pairs += zip(found, balanced.score(prompt), strict=True)
    aggressive = Reference(model, level_set, thresholds, "width-40", "skip")
    for prompt, result in zip(prompts, generated, strict=True):
        expected = aggressive.score(prompt + result["tokens"], num_full=len(prompt))[len(prompt) - 1 :]
        pairs += zip(result["logprobs"], expected, strict=True)
    errors = [abs(a - b) for a, b in pairs]
    assert max(errors) < 5e-3  # a score next to its threshold may fall on either side
    assert sum(errors) / len(errors) < 1e-4
    assert 0 < stats["num_mlp_blocks_skipped"] < stats["num_mlp_blocks_computed"]
    by_name = {t["name"]: t for t in stats["tiers"]}
    num_layers = load_model(model).config.num_hidden_layers
    assert by_name["aggressive"]["num_mlp_blocks_computed"] < max_share * num_layers * by_name["aggressive"]["num_tokens"]
    assert math.isclose(by_name["aggressive"]["num_mlp_blocks_computed"], aggressive.num_blocks, rel_tol=1e-3)


def test_mixed_batch_gives_each_request_its_own_rule(demo_model, demo_probes, heldout_prompts, level_set):
    """16 requests of four tiers at once: each as it comes out alone; and exact ones as plain vLLM computes them, bit for bit."""
    _, policy = _policy(demo_probes, tiers=TIERS)
    prompts = [p[:48] for p in heldout_prompts[:16]]
    tiers = ["exact", "conservative", "balanced", "aggressive"] * 4
    generate = {"do": "generate", "prompts": prompts, "tiers": tiers, "max_tokens": 32, "logprobs": 0}
    steps = [{"do": "apply", "policy": policy}, generate, {**generate, "batch": 1}, {"do": "stats"}]
    _, mixed, alone, stats = run_engine(demo_model, steps, sedac={"probe_set": str(level_set)}, enforce_eager=True, dtype="float32")
    assert [r["tokens"] for r in mixed] == [r["tokens"] for r in alone]
    worst = max(abs(a - b) for x, y in zip(mixed, alone, strict=True) for a, b in zip(x["logprobs"], y["logprobs"], strict=True))
    assert worst < 5e-3
    (plain,) = run_engine(demo_model, [{**generate, "tiers": None, "batch": 1}], enforce_eager=True, dtype="float32")
    assert [r for r, t in zip(alone, tiers, strict=True) if t == "exact"] == [r for r, t in zip(plain, tiers, strict=True) if t == "exact"]
    assert [r["tokens"] for r in alone] != [r["tokens"] for r in plain]
    work = {t["name"]: t["num_mlp_blocks_computed"] / t["num_tokens"] / 12 for t in stats["tiers"] if t["num_tokens"]}
    assert work["exact"] == 1
    assert work["aggressive"] < work["balanced"] < work["conservative"] < 1


@pytest.mark.parametrize(
    ("dtype", "num_phases"),
    [("float32", 3), pytest.param("float32", 8, marks=pytest.mark.thorough), pytest.param("bfloat16", 8, marks=pytest.mark.thorough)],
)
def test_adaptation_reaches_its_target_rates_on_heldout_prompts(demo_model, demo_probes, heldout_prompts, dtype, num_phases):
    """Targets 0.2 / 0.5 / 0.8 from thresholds far off, then prose in place of code; jitter and recovery are printed."""
    _, policy = _policy(demo_probes, "risk_q0.02", default_tier="balanced", tiers=[{"name": "balanced", "level": "full"}])
    adaptation = {"enabled": True, "target_exit_rates": [0.2, 0.5, 0.8], "alpha": 0.1, "warmup_steps": 8, "window_tokens": 1024}
    targets = dict(zip([c["layer"] for c in policy["checkpoints"]], adaptation["target_exit_rates"], strict=True))
    prose = [[1 + (i * 37 + j * j) % 300 for j in range(40)] for i in range(32)]
    steps = [{"do": "apply", "policy": {**policy, "adaptation": adaptation}}]
    phases = (heldout_prompts[:32], heldout_prompts, heldout_prompts, prose, 4 * prose, 2 * prose, 2 * heldout_prompts, heldout_prompts)
    for prompts in phases[:num_phases]:
        steps += [{"do": "generate", "prompts": prompts, "max_tokens": 48}, {"do": "stats"}]
    llm = {"enforce_eager": True, "dtype": dtype, "max_num_seqs": 16}
    results = run_engine(demo_model, steps, sedac={"probe_set": str(demo_probes)}, **llm)
    snapshots = results[2::2]
    rates = []
    for before, after in zip([None, *snapshots[:-1]], snapshots, strict=True):
        totals = {c["layer"]: (c["num_evaluated"], c["num_exited"]) for c in before["checkpoints"]} if before else {}
        rates.append(
            {
                c["layer"]: (c["num_exited"] - totals.get(c["layer"], (0, 0))[1]) / (c["num_evaluated"] - totals.get(c["layer"], (0, 0))[0])
                for c in after["checkpoints"]
            }
        )
    print("exit rates per phase (warm-up, code, code; other text at once, settling, settled; code settling, settled):", rates)
    for phase in (phase for phase in (2, 5, 7) if phase < num_phases):
        for layer, target in targets.items():
            assert math.isclose(rates[phase][layer], target, abs_tol=0.03), (phase, layer, rates)
