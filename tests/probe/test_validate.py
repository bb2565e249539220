"""Validation on the demo model: the engine's figures equal an independent computation, and choosers stand in their order."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch
from sedac.probe import artifact
from sedac_probes import corpus
from sedac_probes.calibration.forms import Skip
from sedac_probes.calibration.reduced import Plain, ReducedModel
from sedac_probes.commands.options import DEMO
from sedac_probes.training.choosers import ORACLE, RANDOM, compare_choosers
from sedac_probes.training.damage import make_batch
from sedac_probes.training.validate import estimate_speedup

from testing.forked import run_python

LENGTH, SAMPLES = 96, 4


@pytest.fixture(scope="module")
def validation(tmp_path_factory):
    out = tmp_path_factory.mktemp("work") / "validation"
    command = ["-m", "sedac_probes.cli", "validate", "--samples", str(SAMPLES), "--max-length", str(LENGTH), "--out", str(out)]
    done = run_python(*command, timeout=600, env=os.environ | {"COLUMNS": "200"})  # one engine per process
    assert done.returncode == 0, done.stderr
    assert "speed-up by bytes" in done.stdout
    assert out.with_suffix(".png").stat().st_size > 10_000
    return json.loads(out.with_suffix(".json").read_text())


def test_figures_equal_an_independent_computation(validation):
    """Transformers with hooks and the probes applied by hand, in fp32; the engine runs the model in bf16."""
    import transformers

    plain = transformers.AutoModelForCausalLM.from_pretrained(str(DEMO / "model"), dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(DEMO / "model"))
    documents = corpus.read_stdlib("heldout")
    documents = documents[:: len(documents) // SAMPLES][:SAMPLES]
    probes = artifact.load(DEMO / "probe-set").probes
    row = next(r for r in validation["policies"] if r["name"] == "hard exits, 10%")
    thresholds = {e["layer"]: e["threshold"] for e in row["exits"]}
    lost = count = 0
    exits = dict.fromkeys(thresholds, 0)
    with torch.inference_mode():
        for document in documents:
            ids = torch.tensor([tokenizer(document.text)["input_ids"][: LENGTH - 1]])
            sure_S = torch.zeros(ids.shape[1], dtype=torch.bool)

            def decide(layer, output, sure_S=sure_S):
                new_S = (probes[layer]((output[0] if isinstance(output, tuple) else output)[0]) < thresholds[layer]) & ~sure_S
                exits[layer] += int(new_S.sum())
                sure_S |= new_S

            def score(ids=ids):
                return plain(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum().item()

            full = score()
            hooks = [
                plain.model.layers[at].register_forward_hook(lambda _m, _i, output, at=at, decide=decide: decide(at, output)) for at in thresholds
            ]
            hooks += [
                block.mlp.register_forward_hook(lambda _m, _i, y, sure_S=sure_S: y.masked_fill(sure_S[None, :, None], 0))
                for block in plain.model.layers
            ]
            lost += full - score()
            for hook in hooks:
                hook.remove()
            count += ids.shape[1] - 1
    assert row["num_tokens"] == count
    assert row["reference_ratio"] == pytest.approx(math.exp(lost / count), rel=1e-4)
    assert row["perplexity_ratio"] == pytest.approx(math.exp(lost / count), rel=0.02)
    tokens = count + SAMPLES
    for e in row["exits"]:
        assert e["exit_rate"] == pytest.approx(exits[e["layer"]] / tokens, abs=1e-6)
        assert e["saved"] == pytest.approx(e["exit_rate"] * (11 - e["layer"]) / 12)
    assert row["saved"] == pytest.approx(sum(e["saved"] for e in row["exits"]), abs=1e-6)
    assert row["exits"][0]["entropy_exited"] < row["exits"][0]["entropy_rest"]
    assert {r["name"] for r in validation["policies"]} >= {"tier conservative", "tier balanced", "tier aggressive"}


def test_speedup_is_one_at_no_saving_and_what_the_shapes_say():
    config = {
        "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16, "vocab_size": 10,
    }  # fmt: skip
    assert estimate_speedup(config, 0.0, 5) == (1.0, 1.0)
    weights = 2 * (3 * 8 * 16) + 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8) + 8 * 10
    read, flops = weights + 2 * 2 * 4 * 5, 2 * weights + 2 * 2 * 2 * (2 * 4) * 5
    assert estimate_speedup(config, 0.5, 5) == pytest.approx((read / (read - 384), flops / (flops - 768)))


def test_measured_damage_beats_the_probes_and_chance():
    model = ReducedModel(str(DEMO / "model"))
    documents = corpus.read_stdlib("heldout")[::12][:6]
    batches = [make_batch([model.tokenizer(d.text)["input_ids"][:LENGTH] for d in documents])]
    probes = {"entropy": artifact.load(DEMO / "probe-set").probes}
    found = compare_choosers(model, batches, probes, 5, (0.1, 0.3), Plain(), Skip())
    assert list(found) == ["entropy", RANDOM, ORACLE]
    for ratios in found.values():
        assert ratios[0] < ratios[1]
    assert all(found[ORACLE][i] < min(found["entropy"][i], found[RANDOM][i]) for i in range(2))
