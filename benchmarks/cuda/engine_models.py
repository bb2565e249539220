"""The models of benchmarks/cuda/engine.py: the demo model as it is, and a dummy with a 7B model's shapes and a probe set made for it.

The dummy's weights are vLLM's (load_format dummy: uniform, +-1e-3), so its answers mean nothing and its speed is a 7B model's. Its probes
are random and its neurons are ordered at random, as importance would order them. D hidden size, F neurons, L layers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_variants import CONTEXTUAL, DEPTHS, WIDTH, get_layer

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = REPOSITORY / "probes" / "sedac_demo"


@dataclass(frozen=True, kw_only=True)
class DummyShape:
    """What a decoder of Qwen2's architecture is made of."""

    hidden_size: int
    num_neurons: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int


QWEN_7B = DummyShape(hidden_size=3584, num_neurons=18944, num_layers=28, num_heads=28, num_kv_heads=4, vocab_size=152064)
TINY = DummyShape(hidden_size=128, num_neurons=256, num_layers=4, num_heads=4, num_kv_heads=2, vocab_size=512)


def write_dummy(directory: Path, shape: DummyShape) -> Path:
    """Write the config of a model without weights or tokenizer, as Qwen2.5-7B's; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "dtype": "bfloat16", "hidden_act": "silu",
        "hidden_size": shape.hidden_size, "intermediate_size": shape.num_neurons, "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads, "num_key_value_heads": shape.num_kv_heads, "vocab_size": shape.vocab_size,
        "max_position_embeddings": 4096, "max_window_layers": shape.num_layers, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "rope_theta": 1000000.0, "use_sliding_window": False, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.02,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return directory


def write_probe_set(directory: Path, shape: DummyShape, rank: int = 64) -> Path:
    """Write a probe set for the dummy: random probes at DEPTHS and two levels of half the neurons; returns the directory.

    The contextual thresholds in it are placeholders: engine_worker.py sets them from gates measured in the engine.
    """
    import torch
    from sedac.probe import artifact
    from sedac.probe.levels import Level, Neurons
    from sedac.probe.manifest import LevelRecord, Manifest, ProbeRecord
    from sedac.probe.probe import LREProbe

    torch.manual_seed(0)
    layers, size, count = [get_layer(depth, shape.num_layers) for depth in DEPTHS], shape.num_neurons, shape.num_layers
    levels = (
        Level(name=CONTEXTUAL, reduction="contextual", parameters_L=torch.ones(count)),
        Level(name=WIDTH, reduction="width", parameters_L=torch.full((count,), size // 2, dtype=torch.int32)),
    )
    manifest = Manifest(
        name="dummy", model="dummy", hidden_size=shape.hidden_size, num_layers=count, rank=rank, target="nothing: random weights",
        probes=tuple(ProbeRecord(layer=layer, threshold=1.0) for layer in layers),
        intermediate_size=size, activation="silu", score="gate",
        levels=tuple(
            LevelRecord(name=name, reduction=level.reduction, saved=saved, perplexity_ratio=1.0)
            for level, name, saved in zip(levels, (CONTEXTUAL, WIDTH), (1 / 3, 0.5), strict=True)
        ),
    )  # fmt: skip
    neurons = {i: Neurons(order_F=torch.randperm(size), scale_F=torch.ones(size), repair_FD=None) for i in range(count)}
    artifact.save(directory, manifest, {layer: LREProbe(shape.hidden_size, rank) for layer in layers}, levels=levels, neurons=neurons)
    return directory


def read_demo_policy() -> dict[str, Any]:
    """Return the demo's checkpoints and tiers as `sedac_apply` takes them, and a tier `skip` under which every token exits at the last checkpoint."""
    from engine_variants import ALWAYS
    from sedac.policy.model import Checkpoint, Policy, Tier

    stored = json.loads((DEMO / "policy.json").read_text())
    checkpoints = tuple(Checkpoint(**c) for c in stored["checkpoints"])
    tiers = tuple(Tier(**t) for t in stored["tiers"] if t["name"] != "certified")
    skip = Tier(name="skip", level="skip", threshold_scale=ALWAYS)
    return Policy(enabled=True, checkpoints=checkpoints, tiers=(*tiers, skip), default_tier="skip").to_dict()


def read_prompts(count: int) -> list[str]:
    """Return the beginnings of so many of this repository's own sources.

    Raises:
        SystemExit: there are fewer.
    """
    found: list[str] = []
    for folder in ("service/sedac", "probes/sedac_probes", "benchmarks"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            if len(text) > 2000 and "_pb2" not in path.name:
                found.append(text[: 240 + 20 * (len(found) % 8)])
    if len(found) < count:
        raise SystemExit(f"{len(found)} sources with over 2000 characters under {REPOSITORY}, {count} are needed; run this in a whole checkout")
    return spread(found, count)


def spread(values: Sequence[str], count: int) -> list[str]:
    """Return `count` of the values, evenly from first to last."""
    return [values[i * len(values) // count] for i in range(count)]
