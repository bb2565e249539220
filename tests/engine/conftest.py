"""Real vLLM engines on the demo model and on tiny random ones, one process each."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from testing.forked import run_python
from testing.shared import make_once

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = REPOSITORY / "probes" / "sedac_demo"


class EngineFailed(Exception):
    """The engine's process ended with an error; carries its output."""


@functools.cache
def _run(job: str, all_cores: bool) -> list[Any]:
    def make(result_path: Path) -> None:
        with tempfile.TemporaryDirectory() as directory:
            job_path, made = Path(directory) / "job.json", Path(directory) / "result.pt"
            job_path.write_text(job)
            done = run_python(Path(__file__).with_name("engine_job.py"), job_path, made, timeout=900, cwd=directory, all_cores=all_cores)
            if done.returncode:
                raise EngineFailed(done.stdout + done.stderr)
            shutil.move(made, result_path)

    name = hashlib.sha256(job.encode()).hexdigest()
    return torch.load(make_once(f"answers/{name}.pt", make), weights_only=False)


def run_engine(
    model: Path | str, steps: list[dict[str, Any]], *, sedac: dict[str, Any] | None = None, before: tuple[str, ...] = (), **llm: Any
) -> list[Any]:
    """Start an engine, run the steps (see engine_job.py), return their results; a job is run once in a session, whoever asks."""
    return _run(json.dumps({"llm": {"model": str(model), **llm}, "sedac": sedac, "before": before, "steps": steps}), "tensor_parallel_size" in llm)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    return DEMO / "model"


@pytest.fixture(scope="session")
def demo_probes() -> Path:
    return DEMO / "probe-set"


@pytest.fixture(scope="session")
def short_model() -> Path:
    """The demo model's first three layers, which are compiled in a quarter of the time."""
    return make_once("short-model", _make_short_model)


SHORT_LAYERS = 3


def _make_short_model(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(DEMO / "model", directory)
    weights = load_file(directory / "model.safetensors")
    kept = {k: v for k, v in weights.items() if not k.startswith("model.layers.") or int(k.split(".")[2]) < SHORT_LAYERS}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config |= {"num_hidden_layers": SHORT_LAYERS, "layer_types": config["layer_types"][:SHORT_LAYERS]}
    (directory / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def short_probes(short_model: Path, heldout_prompts: list[list[int]]) -> Path:
    """Two of the demo's probes for the short model, with the quantiles of what they say there."""
    return make_once("short-probes", functools.partial(_make_short_probes, short_model, heldout_prompts[:16]))


def _make_short_probes(model: Path, prompts: list[list[int]], directory: Path) -> None:
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


@pytest.fixture(scope="session")
def heldout_prompts() -> list[list[int]]:
    """64 prompts of 24 to 80 tokens from files that neither the model nor the probes were trained on."""
    return read_heldout_prompts(64)


def read_heldout_prompts(num_prompts: int) -> list[list[int]]:
    """Prompts of 24 to 80 tokens from files that neither the demo model nor its probes were trained on."""
    from sedac_probes import corpus
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    texts = corpus.cut_prompts(corpus.read_stdlib("heldout"), num_prompts=num_prompts, num_chars=400)
    return [tokenizer(text)["input_ids"][: 24 + i % 57] for i, text in enumerate(texts)]


@pytest.fixture(scope="session")
def short_drafts(short_model: Path) -> dict[str, Path]:
    """Drafts for the short model, by name."""
    return find_drafts(make_once("short-drafts", functools.partial(make_drafts, short_model)))


@pytest.fixture(scope="session")
def drafts(demo_model: Path) -> dict[str, Path]:
    """Directories of drafts for the demo model, by name: one of each kind, and `whole`, which leaves nothing out."""
    return find_drafts(make_once("drafts", functools.partial(make_drafts, demo_model)))


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


DRAFTER = {"method": "custom_class", "model": "sedac.engine.drafting.drafter.Drafter", "num_speculative_tokens": 4}


TORCH_DRAFTS = ("refuse_native_drafts",)
"""`before` of an engine whose draft passes shall run in torch, not in the native operator"""


def speculation(**knobs: Any) -> dict[str, Any]:
    """The step that puts a policy with these knobs of `Speculation` into force; lengths are the draft's unless `adaptive` is asked for."""
    return {"do": "apply", "policy": {"speculation": {"adaptive": False, **knobs}}}
