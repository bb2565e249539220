"""Training on the demo model: damage is what reducing one token alone does, and probes trained on it order tokens by it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import safetensors.torch
import torch
from sedac.errors import ConfigError
from sedac_probes import corpus
from sedac_probes.calibration.forms import Skip
from sedac_probes.calibration.reduced import Plain, ReducedModel
from sedac_probes.collecting.collection import Collection, write_description
from sedac_probes.commands.options import DEMO
from sedac_probes.training.damage import Watched, make_batch, make_form, measure_collection, measure_damage, read_damage
from sedac_probes.training.train import describe_errors, make_target, train_probe

LAYERS, LENGTH = (2, 8), 96


@pytest.fixture(scope="module")
def model():
    return ReducedModel(str(DEMO / "model"))


@pytest.fixture(scope="module")
def ids(model):
    documents = corpus.read_stdlib("train")[::40][:40]
    return [model.tokenizer(d.text)["input_ids"][:LENGTH] for d in documents]


@pytest.fixture(scope="module")
def collection(model, ids, tmp_path_factory):
    """Streams and entropies of 40 documents, recorded from the model itself, with the damage of skipping measured beside them."""
    directory = tmp_path_factory.mktemp("work") / "streams"
    directory.mkdir()
    parts: dict[str, list[torch.Tensor]] = {}
    with torch.inference_mode():
        for n, row in enumerate(ids):
            watched = Watched(Plain(), LAYERS)
            logprob_SV = model.run(make_batch([row]), watched)[0][0].log_softmax(-1)
            parts.setdefault("entropy", []).append(-(logprob_SV.exp() * logprob_SV).sum(-1))
            parts.setdefault("document", []).append(torch.full((len(row),), n))
            parts.setdefault("position", []).append(torch.arange(len(row)))
            for layer in LAYERS:
                parts.setdefault(f"stream.{layer}", []).append(watched.streams[layer][0])
    safetensors.torch.save_file({name: torch.cat(pieces) for name, pieces in parts.items()}, directory / "shard-00000.safetensors")
    described = Collection(
        model=str(DEMO / "model"), layers=LAYERS, num_documents=len(ids), max_length=LENGTH + 1, hidden_size=256, num_layers=12, data_digest="x"
    )
    write_description(directory, described)
    measure_collection(directory, model, ids, LAYERS, Skip(), "skip")
    return directory


def test_damage_is_that_of_reducing_one_token_alone(model, ids):
    """An independent model with hooks, one token reduced per pass; the second text is shorter, so padding is in play."""
    import transformers

    plain = transformers.AutoModelForCausalLM.from_pretrained(str(DEMO / "model"), dtype=torch.float32).eval()
    texts = [ids[0], ids[1][:50]]
    found = measure_damage(model, make_batch(texts), LAYERS, Skip())
    with torch.inference_mode():
        for row, text in enumerate(texts):
            full_SV = plain(torch.tensor([text])).logits[0].log_softmax(-1)
            for layer in LAYERS:
                for token in (0, 1, 17, len(text) - 1):

                    def remove(_mlp, _inputs, output, token=token):
                        output[:, token] = 0
                        return output

                    hooks = [block.mlp.register_forward_hook(remove) for block in plain.model.layers[layer + 1 :]]
                    one_V = plain(torch.tensor([text])).logits[0, token].log_softmax(-1)
                    for hook in hooks:
                        hook.remove()
                    expected = torch.nn.functional.kl_div(one_V, full_SV[token], log_target=True, reduction="sum").item()
                    assert found[layer][row, token].item() == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_damage_of_a_level_is_less_than_of_skipping(model, ids):
    batch = make_batch(ids[:2])
    level = make_form(model, "contextual-30", DEMO / "probe-set")
    light, heavy = (measure_damage(model, batch, (2,), form)[2][batch.real_BS] for form in (level, Skip()))
    assert 0 < light.mean() < heavy.mean() / 10
    assert measure_damage(model, batch, (2,), Plain())[2].max() < 1e-5
    with pytest.raises(ConfigError, match=r"no level 'nothing'; it has skip, .*contextual-30"):
        make_form(model, "nothing", DEMO / "probe-set")
    with pytest.raises(ConfigError, match=r"checkpoints \[11\].*0 to 10"):
        measure_damage(model, batch, (11,), Skip())


def test_measuring_goes_on_where_it_was_stopped(model, ids, collection):
    directory = collection / "damage-skip"
    files = {path: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}
    assert len(files) == 3  # 4 documents held out, 36 to train on
    lost = list(files)[1]
    lost.unlink()
    times = {path: path.stat().st_mtime_ns for path in files if path != lost}
    measure_collection(collection, model, ids, LAYERS, Skip(), "skip")
    assert {path: path.read_bytes() for path in files} == files
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_probe_trained_on_damage_orders_tokens_better(collection):
    """At the later checkpoint, with each of three seeds: a margin in rank correlation on held-out documents."""
    damage = collection / "damage-skip"
    for seed in range(3):
        shared = {"damage": damage, "max_epochs": 15, "batch_size": 256, "seed": seed}
        own = train_probe(collection, 8, target="damage", **shared)
        entropy = train_probe(collection, 8, **shared)
        assert own.spearman == pytest.approx(own.spearman_damage, abs=2e-3)  # ranks keep the order, up to ties
        assert own.spearman_damage > entropy.spearman_damage + 0.05
        assert entropy.spearman > 0.3


def test_training_is_deterministic_and_stops_early(collection):
    first, second = (train_probe(collection, 2, batch_size=64, lr=0.02, max_epochs=60, seed=5) for _ in range(2))
    assert all(torch.equal(t, second.probe.state_dict()[name]) for name, t in first.probe.state_dict().items())
    best = first.losses.index(min(first.losses))
    assert len(first.losses) == best + 4 < 60  # three epochs without a better one, and the best is kept
    assert first.huber == min(first.losses)
    other = train_probe(collection, 2, batch_size=64, lr=0.02, max_epochs=60, seed=6)
    assert not torch.equal(other.probe.down.weight, first.probe.down.weight)


def test_what_cannot_be_trained_is_refused(collection, tmp_path):
    with pytest.raises(ConfigError, match=r"damage of layer 2 is measured for 0%"):
        train_probe(collection, 2, target="damage")
    with pytest.raises(ConfigError, match=r"--rank is 0"):
        train_probe(collection, 2, rank=0)
    broken = tmp_path / "damage-skip"
    broken.mkdir()
    (broken / "rest-00000.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(ConfigError, match=r"rest-00000.safetensors can't be read"):
        read_damage(broken, 2, torch.arange(3))


def test_calibration_and_confidence():
    risk_N = torch.linspace(0, 1, 100)
    found = describe_errors(risk_N, risk_N + torch.where(risk_N < 0.25, 0.5, -0.1))
    observed, predicted = ([point[key] for point in found["calibration"]] for key in ("observed", "predicted"))
    assert len(observed) == 10
    assert all(a < b for a, b in pairwise(predicted))
    assert observed[0] == pytest.approx(predicted[0] + 0.5)
    assert found["overconfident"] == pytest.approx({"share": 0.25, "size": 0.5})
    assert found["underconfident"] == pytest.approx({"share": 0.75, "size": 0.1})


def test_the_target_keeps_the_order_of_damage():
    damage_N, trained_N = torch.tensor([0.3, 0.001, 0.02, 5.0, 0.1]), torch.tensor([True, True, True, False, True])
    for transform in ("log", "rank"):
        assert make_target(damage_N, trained_N, transform).argsort().tolist() == [1, 2, 4, 0, 3]
