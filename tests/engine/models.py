"""Small models, probes and drafts that the tests make from the demo's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from tests.engine.running import DEMO

SHORT_LAYERS = 3


def make_short_model(directory: Path) -> None:
    """Write the demo model's first layers, which are compiled in a quarter of the time."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(DEMO / "model", directory)
    weights = load_file(directory / "model.safetensors")
    kept = {k: v for k, v in weights.items() if not k.startswith("model.layers.") or int(k.split(".")[2]) < SHORT_LAYERS}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config |= {"num_hidden_layers": SHORT_LAYERS, "layer_types": config["layer_types"][:SHORT_LAYERS]}
    (directory / "config.json").write_text(json.dumps(config))


def make_short_probes(model: Path, prompts: list[list[int]], directory: Path) -> None:
    """Write two of the demo's probes for the short model, with the quantiles of what they say on the prompts."""
    from sedac.probe import artifact
    from sedac.probe.manifest import Manifest, ProbeRecord
    from transformers import AutoModelForCausalLM

    demo = artifact.load(DEMO / "probe-set")
    probes = dict(zip((0, 1), demo.probes.values(), strict=False))
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        streams = [reference(torch.tensor([prompt]), output_hidden_states=True).hidden_states for prompt in prompts]
        risks = {layer: torch.cat([probe(seen[layer + 1][0]) for seen in streams]) for layer, probe in probes.items()}
    metrics = {layer: {f"risk_q{q}": risk.quantile(q).item() for q in (0.2, 0.4)} for layer, risk in risks.items()}
    records = tuple(ProbeRecord(layer=layer, threshold=metrics[layer]["risk_q0.2"], metrics=metrics[layer]) for layer in probes)
    kept = {name: getattr(demo.manifest, name) for name in ("model", "hidden_size", "rank", "target")}
    artifact.save(directory, Manifest(name="short", num_layers=SHORT_LAYERS, probes=records, **kept), probes)


def find_drafts(directory: Path) -> dict[str, Path]:
    """The drafts in a folder, by name."""
    return {path.name: path for path in directory.iterdir()}


def make_drafts(model: Path, directory: Path) -> None:
    """Write drafts that the model accepts in part: their heads are its own last layer's weights, without the biases of attention."""
    from safetensors.torch import load_file
    from sedac.probe.draft import DraftHead, DraftManifest, save_draft

    config = json.loads((model / "config.json").read_text())
    weights = load_file(model / "model.safetensors")
    num_layers, num_heads = config["num_hidden_layers"], config["num_attention_heads"]
    size, neurons = config["hidden_size"], config["intermediate_size"]
    attention = {"num_heads": num_heads, "num_kv_heads": config["num_key_value_heads"], "head_size": size // num_heads}
    kinds: dict[str, dict[str, Any]] = {
        "adapter": {"kind": "adapter", "depth": num_layers - 2, "intermediate_size": neurons, **attention},
        "exit-head": {"kind": "exit-head", "depth": num_layers - 2, "intermediate_size": neurons},
        "reduced": {
            "kind": "reduced",
            "depth": num_layers,
            "level": "contextual-50",
            "skip_attention": (num_layers // 2 - 1,),
            "skip_mlp": (num_layers // 4, num_layers // 2 + 1),
        },
        "whole": {"kind": "reduced", "depth": num_layers},
    }
    for name, fields in kinds.items():
        common = {"model": "sedac-demo", "hidden_size": size, "num_layers": num_layers, "max_tokens": 4, "min_confidence": 0.3}
        manifest = DraftManifest(name=name, **common, **fields)
        head = None
        if manifest.kind != "reduced":
            head = DraftHead(manifest)
            own = {key.split(".", 3)[3]: value for key, value in weights.items() if key.startswith(f"model.layers.{num_layers - 1}.")}
            own = {key.removeprefix("self_attn.").removeprefix("mlp."): value for key, value in own.items()} | {
                "norm.weight": weights["model.norm.weight"]
            }
            head.load_state_dict({key: own[key] for key in head.state_dict()})
        save_draft(directory / name, manifest, head)
