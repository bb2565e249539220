"""SEDAC attaches to any architecture with the decoder contract, and says which one does not have it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine.reference import Reference
from tests.engine.running import EngineFailed, run_engine

pytestmark = pytest.mark.engine

_SHAPE = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1}
_LAYERS = (0, 2)


def _make(architecture: str, directory: Path, **extra) -> Path:
    """Write a tiny random model in the Hugging Face layout, without a tokenizer."""
    import transformers

    config = getattr(transformers, f"{architecture}Config")(
        **_SHAPE, max_position_embeddings=512, bos_token_id=0, eos_token_id=0, pad_token_id=0, **extra
    )
    torch.manual_seed(1)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    for p in model.parameters():  # large enough that skipping an MLP shows in the log-probabilities
        torch.nn.init.normal_(p, std=0.08) if p.ndim == 2 else None
    model.save_pretrained(directory)
    return directory


def _make_probes(directory: Path, hidden_size: int = 128) -> Path:
    from sedac.probe import artifact
    from sedac.probe.manifest import Manifest, ProbeRecord
    from sedac.probe.probe import LREProbe

    torch.manual_seed(2)
    probes = {layer: LREProbe(hidden_size, 16) for layer in _LAYERS}
    for probe in probes.values():
        torch.nn.init.normal_(probe.out.weight, std=0.5)
    records = tuple(ProbeRecord(layer=layer, threshold=0.6) for layer in _LAYERS)
    artifact.save(
        directory, Manifest(name="tiny", model="tiny", hidden_size=hidden_size, num_layers=4, rank=16, target="none", probes=records), probes
    )
    return directory


@pytest.mark.parametrize(
    ("architecture", "extra", "eager"),
    [
        ("Qwen2", {}, True),
        ("Qwen3", {"head_dim": 64}, True),
        ("Llama", {}, True),
        pytest.param("Llama", {}, False, marks=pytest.mark.thorough),
        ("Mistral", {"sliding_window": None, "head_dim": 64}, True),
        ("Gemma2", {"head_dim": 64, "query_pre_attn_scalar": 64}, True),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_gated_model_equals_the_reference(tmp_path, architecture, extra, eager):
    model, probes = _make(architecture, tmp_path / "model", **extra), _make_probes(tmp_path / "probes")
    prompts = [torch.randint(1, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (9, 30, 61)]
    thresholds = {layer: 0.6 for layer in _LAYERS}
    policy = {"enabled": True, "phase": "all", "checkpoints": [{"layer": layer, "threshold": t} for layer, t in thresholds.items()]}
    steps = [{"do": "apply", "policy": policy}, {"do": "score", "prompts": prompts}, {"do": "stats"}]
    llm = {"enforce_eager": eager, "dtype": "float32", "skip_tokenizer_init": True}
    _, scored, stats = run_engine(model, steps, sedac={"probe_set": str(probes)}, **llm)
    reference = Reference(model, probes, thresholds)
    expected = [reference.score(prompt)[0] for prompt in prompts]
    exits = {c["layer"]: c["num_exited"] for c in stats["checkpoints"]}
    assert exits == reference.exit_layers
    assert all(0 < count < sum(map(len, prompts)) for count in exits.values())
    for ours, theirs in zip(scored, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_architecture_without_the_contract_is_refused_by_name(tmp_path):
    import transformers

    config = transformers.GPT2Config(vocab_size=256, n_positions=512, n_embd=128, n_layer=4, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    with pytest.raises(EngineFailed, match=r"UnsupportedModel: GPT2LMHeadModel: .*serve this model without SEDAC"):
        run_engine(tmp_path / "model", [], sedac={"probe_set": str(_make_probes(tmp_path / "probes"))}, enforce_eager=True, skip_tokenizer_init=True)


def test_probe_set_of_another_hidden_size_is_refused(tmp_path):
    model = _make("Llama", tmp_path / "model")
    with pytest.raises(EngineFailed, match=r"trained for hidden size 64 and 4 layers, the model has\s+128 and 4"):
        run_engine(
            model, [], sedac={"probe_set": str(_make_probes(tmp_path / "probes", hidden_size=64))}, enforce_eager=True, skip_tokenizer_init=True
        )


def test_pipeline_parallelism_is_refused():
    from types import SimpleNamespace

    from sedac.engine.vllm.refusals import refuse_layout
    from sedac.errors import UnsupportedModel

    parallel = SimpleNamespace(pipeline_parallel_size=2, num_ubatches=0)
    with pytest.raises(UnsupportedModel, match=r"pipeline_parallel_size is 2; .* supports 1: use tensor parallelism"):
        refuse_layout(SimpleNamespace(parallel_config=parallel, compilation_config=None))
