"""A probe set with levels, the steps of an engine that use them, and what transformers computes for the same."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import torch
from sedac.probe import artifact
from sedac.probe.levels import Level, Neurons, reduce_mlp
from sedac.probe.manifest import LevelRecord, Manifest
from transformers import AutoModelForCausalLM

TIERS = [
    {"name": "conservative", "floor": "contextual-20", "level": "contextual-20"},
    {"name": "balanced", "floor": "contextual-20", "level": "width-40"},
    {"name": "aggressive", "floor": "width-40", "level": "skip"},
]


@functools.cache
def load_model(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


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


def make_policy(demo_probes, quantile="risk_q0.4", **knobs):
    from sedac.probe.manifest import read_manifest

    thresholds = {p.layer: p.metrics[quantile] for p in read_manifest(demo_probes).probes}
    return thresholds, {"enabled": True, "checkpoints": [{"layer": n, "threshold": t} for n, t in thresholds.items()], **knobs}


def make_level_steps(probe_set: Path, prompts: list[list[int]]) -> list[dict]:
    """Prompts in full or reduced, a few rows at a time (native kernels) or many (masked)."""
    _, everything = make_policy(probe_set, phase="all", tiers=TIERS)
    return [
        {"do": "apply", "policy": everything, "revision": 1},
        {"do": "score", "prompts": prompts},
        {"do": "apply", "policy": {**everything, "phase": "decode", "default_tier": "aggressive"}, "revision": 2},
        {"do": "generate", "prompts": prompts, "batch": 1, "max_tokens": 24, "logprobs": 0},
        {"do": "stats"},
    ]


def check_levels(model: Path, level_set: Path, prompts: list[list[int]], results: list, max_share: float = 0.8) -> None:
    """Hold what these steps gave against the reference: log-probabilities, and what was computed, at most `max_share` in the lowest tier."""
    thresholds, _ = make_policy(level_set)
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
