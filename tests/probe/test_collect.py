"""What `collect` writes equals an independent transformers forward, survives kill -9 to the byte, and trains probes that serve."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from sedac_probes import corpus
from sedac_probes.collecting.collection import read_statistics
from sedac_probes.commands.options import read_documents

from testing.forked import run_python
from tests.engine.running import run_engine

pytestmark = pytest.mark.engine

DEMO = Path(__file__).resolve().parents[2] / "probes" / "sedac_demo" / "model"
LAYERS, LENGTH, SAMPLES = (0, 2), 96, 20  # two shards, of 16 and of 4 documents


def make_arguments(out, *options, model=DEMO):
    return ["-m", "sedac_probes.cli", "collect", "--out", str(out), "--model", str(model), *map(str, options)]


def collect(out, *options, all_cores=False, **keywords):
    done = run_python(*make_arguments(out, *options, **keywords), timeout=600, all_cores=all_cores)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def read_shards(directory):
    return [safetensors.torch.load_file(path) for path in sorted(directory.glob("shard-*.safetensors"))]


def get_bytes(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def make_model(architecture, directory, **extra):
    """Write a tiny random model with the demo's tokenizer."""
    import transformers

    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=4096, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=512, bos_token_id=0, eos_token_id=0, pad_token_id=0, **extra,
    )  # fmt: skip
    torch.manual_seed(1)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.08) if p.ndim == 2 else None
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, directory)
    return directory


@torch.no_grad()
def forward(model, ids, layers):
    """An independent forward: (streams by layer, log-probabilities (T, V), sums of abs(up) and abs(act(gate) * up) by layer)."""
    seen, sums, handles = {}, {}, []
    for index, layer in enumerate(model.model.layers):
        if index in layers:
            handles.append(layer.register_forward_hook(lambda m, i, o, index=index: seen.update({index: (o[0] if isinstance(o, tuple) else o)})))

        def watch(mlp, inputs, output, index=index):
            x = inputs[0][0]
            up = x @ mlp.up_proj.weight.T
            gate = x @ mlp.gate_proj.weight.T
            sums[index] = (up.abs().double().sum(0), (gate * torch.sigmoid(gate) * up).abs().double().sum(0))

        handles.append(layer.mlp.register_forward_hook(watch))
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    for handle in handles:
        handle.remove()
    return {index: stream.reshape(len(ids), -1) for index, stream in seen.items()}, logits.log_softmax(-1), sums


@pytest.mark.parametrize(
    ("architecture", "extra"),
    [
        ("Llama", {}),
        pytest.param("", {}, marks=pytest.mark.thorough),
        pytest.param("Qwen3", {"head_dim": 64}, marks=pytest.mark.thorough),
    ],
    ids=["Llama", "demo", "Qwen3"],
)
def test_equals_transformers_trains_and_serves(tmp_path, architecture, extra):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = make_model(architecture, tmp_path / "model", **extra) if architecture else DEMO
    out = tmp_path / "streams"
    collect(out, "--samples", SAMPLES, "--max-length", LENGTH, "--dtype", "float32", "--layers", "2,0", model=model)
    reference, tokenizer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(model)
    documents = read_documents(None, "train", SAMPLES)
    assert json.loads((out / "collection.json").read_text())["data_digest"] == corpus.digest(documents)
    shards = read_shards(out)
    assert len(shards) == 2
    totals = {}
    num_tokens = 0
    for number, document in enumerate(documents):
        ids = tokenizer(document.text)["input_ids"][: LENGTH - 1]
        streams, logprobs, sums = forward(reference, ids, LAYERS)
        shard = shards[number // 16]
        mine = shard["document"] == number
        assert shard["position"][mine].tolist() == list(range(len(ids)))
        for layer in LAYERS:
            torch.testing.assert_close(shard[f"stream.{layer}"][mine], streams[layer], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(shard["entropy"][mine], -(logprobs.exp() * logprobs).sum(-1), atol=1e-4, rtol=0)
        torch.testing.assert_close(shard["top_logprob"][mine], logprobs.topk(8).values, atol=1e-4, rtol=0)
        torch.testing.assert_close(shard["top_logprob"][mine], logprobs.gather(1, shard["top_token"][mine].long()), atol=1e-4, rtol=0)
        following = shard["next_logprob"][mine]
        torch.testing.assert_close(following[:-1], logprobs[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0], atol=1e-4, rtol=0)
        assert following[-1].isnan()
        num_tokens += len(ids)
        for layer, (up, hidden) in sums.items():
            old = totals.get(layer, (0, 0))
            totals[layer] = (old[0] + up, old[1] + hidden)
    found = read_statistics(out)
    assert found.num_tokens == num_tokens
    assert sorted(found.up) == list(range(len(reference.model.layers)))
    for layer, (up, hidden) in totals.items():
        torch.testing.assert_close(found.up[layer], up, rtol=1e-4, atol=0)
        torch.testing.assert_close(found.hidden[layer], hidden, rtol=1e-4, atol=1e-9)
    probes = tmp_path / "probes"
    train = ["-m", "sedac_probes.cli", "train", "--collection", out, "--out", probes, "--name", "tiny", "--epochs", "2", "--rank", "16"]
    assert run_python(*train, timeout=600).returncode == 0
    prompt = tokenizer(documents[0].text)["input_ids"][:40]
    policy = {"enabled": True, "phase": "all", "checkpoints": [{"layer": layer, "threshold": 100.0} for layer in LAYERS]}
    steps = [{"do": "apply", "policy": policy}, {"do": "score", "prompts": [prompt]}, {"do": "stats"}]
    applied, _, stats = run_engine(model, steps, sedac={"probe_set": str(probes)}, enforce_eager=True, dtype="float32")
    assert applied[0]["violations"] == []
    assert [(c["layer"], c["num_exited"]) for c in stats["checkpoints"]] == [(0, len(prompt)), (2, 0)]


@pytest.mark.thorough
def test_killed_and_resumed_gives_the_same_bytes(tmp_path):
    options = ("--samples", 48, "--max-length", 160, "--suggest")
    output = collect(tmp_path / "whole", *options)
    assert "rank correlation" in output
    command = [sys.executable, *make_arguments(tmp_path / "killed", *options)]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = tmp_path / "killed" / "shard-00000.safetensors"
    limit = time.monotonic() + 300
    while not first.exists() and killed.poll() is None and time.monotonic() < limit:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    before = get_bytes(tmp_path / "killed")
    assert "shard-00000.safetensors" in before
    assert "shard-00002.safetensors" not in before
    collect(tmp_path / "killed", *options)
    whole = get_bytes(tmp_path / "whole")
    assert sorted(whole) == ["collection.json", *(f"shard-0000{i}.safetensors" for i in range(3))]
    resumed = get_bytes(tmp_path / "killed")
    assert sorted(resumed) == sorted(whole)
    assert [name for name in whole if resumed[name] != whole[name]] == []


@pytest.mark.thorough
def test_two_ranks_record_what_one_does(tmp_path):
    options = ("--samples", 4, "--max-length", 64, "--dtype", "float32")
    collect(tmp_path / "one", *options)
    collect(tmp_path / "two", *options, "--tensor-parallel-size", 2, all_cores=True)
    (one,), (two,) = read_shards(tmp_path / "one"), read_shards(tmp_path / "two")
    assert sorted(one) == sorted(two)
    for name, values in one.items():
        if name != "top_token":
            torch.testing.assert_close(two[name], values, atol=1e-3, rtol=1e-4, equal_nan=True)


def test_mlp_without_a_gate_keeps_its_streams(tmp_path):
    from sedac.errors import ConfigError

    model = make_model("Nemotron", tmp_path / "model")
    output = collect(tmp_path / "streams", "--samples", 4, "--max-length", 64, model=model)
    assert "no neuron statistics of layers [0, 1, 2, 3]: NemotronMLP is no MLP of gate, up and down projection" in output.replace("Gated", "")
    (shard,) = read_shards(tmp_path / "streams")
    assert not any(name.startswith("statistics.") for name in shard)
    assert shard["stream.1"].shape == (len(shard["entropy"]), 128)
    with pytest.raises(ConfigError, match=r"no neuron statistics of layers \[0, 1, 2, 3\]"):
        read_statistics(tmp_path / "streams")


_FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, 2 << 20))  # a shard is larger: the real write fails
sys.argv[1:] = {arguments!r}
from sedac_probes.cli import main
main()
"""


def test_full_disk_leaves_nothing_half_written_and_is_resumed(tmp_path):
    out = tmp_path / "streams"
    arguments = ["collect", "--out", str(out), "--samples", "8"]
    done = run_python("-c", _FULL.format(arguments=arguments), timeout=600)
    assert done.returncode == 1, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("sedac-probes:")]
    assert "shard-00000.safetensors can't be written" in said
    assert "run the same command: it resumes" in said
    assert [path.name for path in out.iterdir()] == ["collection.json"]
    collect(out, "--samples", 8)
    assert len(read_shards(out)) == 1
