"""Calibration and comparison end to end on a tiny random model: what they write loads, and the figures mean what they say."""

from __future__ import annotations

import json

import pytest
import torch
from sedac.errors import ConfigError
from sedac.probe import artifact
from sedac.probe.cascade import Knobs
from sedac.probe.levels import Level
from sedac.probe.manifest import Manifest, ProbeRecord, TierRecord
from sedac.probe.probe import LREProbe
from sedac_probes import cli
from sedac_probes.calibration import calibrate
from sedac_probes.calibration.forms import AtLevel, Decided, Randomly, Skip
from sedac_probes.calibration.neurons import describe_neurons
from sedac_probes.calibration.plan import plan_savings
from sedac_probes.calibration.reduced import Plain, Quality, ReducedModel
from sedac_probes.calibration.reductions import make_level
from sedac_probes.calibration.repair import fit_repair
from sedac_probes.calibration.tiers import Target, find_tier, set_thresholds
from typer.testing import CliRunner

LAYERS, HIDDEN, SIZE = 3, 32, 48


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    import tokenizers
    import transformers

    directory = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=HIDDEN, intermediate_size=SIZE, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.3, max_position_embeddings=128,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def text_files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("texts")
    paths = [directory / f"{i}.txt" for i in range(12)]
    for i, path in enumerate(paths):
        path.write_text("".join(f"line {n * (i + 3)} of file {i}\n" for n in range(30)))
    return paths


@pytest.fixture
def model(model_dir):
    return ReducedModel(str(model_dir))


@pytest.fixture
def probe_set(tmp_path):
    torch.manual_seed(1)
    metrics = {f"risk_q{q}": 0.5 + q for q in (0.02, 0.05, 0.1, 0.2, 0.4)}
    records = tuple(ProbeRecord(layer=layer, threshold=0.6, metrics=metrics) for layer in (0, 1))
    manifest = Manifest(name="tiny", model="tiny", hidden_size=HIDDEN, num_layers=LAYERS, rank=4, target="x", probes=records, training={"lr": 0.002})
    artifact.save(tmp_path / "set", manifest, {layer: LREProbe(HIDDEN, 4) for layer in (0, 1)})
    return tmp_path / "set"


def run(*arguments):
    done = CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_calibrates_and_compares_end_to_end(model, model_dir, text_files, probe_set, tmp_path):
    texts = [part for path in text_files for part in ("--texts", path)]
    common = ["--model", model_dir, "--probe-set", probe_set, "--max-length", 64, *texts]
    before = artifact.load(probe_set)
    assert "contextual-30" in run("calibrate", *common, "--out", tmp_path / "new", "--report", tmp_path / "report")
    assert artifact.load(probe_set).manifest == before.manifest  # --out leaves the old set alone

    made = artifact.load(tmp_path / "new")
    manifest = made.manifest
    assert manifest.probes == before.manifest.probes
    for layer, probe in before.probes.items():
        assert all(torch.equal(t, made.probes[layer].state_dict()[name]) for name, t in probe.state_dict().items())
    assert (manifest.intermediate_size, manifest.activation) == (SIZE, "silu")
    assert manifest.training["lr"] == 0.002
    assert [level.saved for level in manifest.levels] == sorted(level.saved for level in manifest.levels)
    assert {"contextual-30", "width-50"} <= {level.name for level in manifest.levels}
    for level in manifest.levels:
        assert level.saved == pytest.approx(int(level.name.split("-")[1]) / 100, abs=0.04)
    assert [tier.name for tier in manifest.tiers] == ["conservative", "balanced", "aggressive"]
    assert (tmp_path / "report.png").stat().st_size > 10_000

    run("compare", *common[:2], "--probe-set", tmp_path / "new", *common[4:], "--out", tmp_path / "quality")
    report = json.loads((tmp_path / "quality.json").read_text())
    assert len(report["mechanisms"]) == 12
    found = {row["at"]: row for row in report["mechanisms"]["contextual, plan, repair"]}
    assert set(found) == {level.name for level in manifest.levels if level.reduction == "contextual"}
    assert all(row["saved"] == 0 for row in report["mechanisms"]["soft exit as published (v6.1)"])
    assert (tmp_path / "quality.png").stat().st_size > 10_000


def test_other_models_are_refused_by_name(tmp_path, model, probe_set):
    import transformers

    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    model.tokenizer.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel.*gate_proj, up_proj, down_proj"):
        ReducedModel(str(tmp_path / "gpt2"))
    loaded = artifact.load(probe_set)
    other = artifact.ProbeSet(manifest=Manifest(**{**vars(loaded.manifest), "num_layers": 9}), probes=loaded.probes)
    with pytest.raises(ConfigError, match="9 layers of hidden size 32, the model has 3 layers"):
        calibrate.calibrate(model, other, ["text"] * 8)


@torch.inference_mode()
def test_one_layer_at_a_time_equals_the_whole_pass(model, text_files):
    (batch,) = model.make_batches([p.read_text() for p in text_files[:3]], max_length=40)
    whole, computed = model.run(batch, Plain())
    torch.testing.assert_close(whole, model.model(input_ids=batch.ids_BS).logits)
    assert computed == 1.0
    stream = None
    for layer in range(LAYERS):
        torch.testing.assert_close(model.run(batch, Plain(), layer, stream)[0], whole)
        stream = model.advance(batch, Plain(), layer, stream)
    assert model.run(batch, Skip(), 1, model.advance(batch, Plain(), 0, None))[1] == pytest.approx(1 / 3)


@torch.inference_mode()
def test_padding_changes_nothing(model, text_files):
    texts = [text_files[0].read_text()[:50], text_files[1].read_text()]
    together = model.measure(model.make_batches(texts, max_length=40), [Skip()])[0]
    apart = model.measure(model.make_batches(texts, max_length=40, batch_size=1), [Skip()])[0]
    assert together.num_tokens == apart.num_tokens
    assert together.kl == pytest.approx(apart.kl, rel=1e-4)
    assert together.saved == 1.0


def test_the_plan_takes_the_cheapest_and_protects_what_is_dear():
    cheap, dear = [(0.2, 0.01), (0.4, 0.04)], [(0.2, 5.0), (0.4, 20.0)]
    plan = plan_savings([dear, cheap, cheap], 0.2)
    assert plan[0] == pytest.approx(0.0, abs=0.02)  # its first small steps cost as little as the others' last
    assert plan[1:] == pytest.approx([0.3, 0.3], abs=0.02)
    assert sum(plan) == pytest.approx(3 * 0.2)
    assert plan_savings([dear, cheap, cheap], 0.4) == pytest.approx([0.4, 0.4, 0.4])
    assert plan_savings([dear, cheap, cheap], 0.0) == [0.0, 0.0, 0.0]
    bulging = [(0.2, 1.0), (0.4, 1.1)]  # its hull is the chord: the second half pays for the first
    assert plan_savings([bulging, [(0.2, 0.6), (0.4, 1.2)]], 0.2) == pytest.approx([0.4, 0.0], abs=1e-6)


@torch.inference_mode()
def test_repair_lowers_the_error_of_its_level(model, text_files):
    batches = model.make_batches([p.read_text() for p in text_files], max_length=64)
    neurons = describe_neurons(model, batches)
    level = make_level(model, batches, "x", "contextual", [0.0, 0.4, 0.0], neurons, "gate")
    assert level.parameters_L[0] == level.parameters_L[2] == 0.0
    repaired = fit_repair(model, batches, [level], neurons, "gate", ridge=1e-3)
    errors = []
    for known in (neurons, repaired):
        stream = model.advance(batches[0], Plain(), 0, None)
        full, reduced = (model.advance(batches[0], form, 1, stream) for form in (Plain(), AtLevel(level, known, "silu", "gate")))
        errors.append((full - reduced)[batches[0].real_BS].norm().item())
    assert errors[1] < 0.9 * errors[0]


def quality(saved, ratio):
    return Quality(saved=saved, perplexity_ratio=ratio, agreement=1.0, kl=0.0, num_tokens=1)


def test_tiers_meet_their_targets():
    levels = [
        Level(name=name, reduction=kind, parameters_L=torch.zeros(1))
        for name, kind in (("c-20", "contextual"), ("w-20", "width"), ("c-30", "contextual"), ("c-40", "contextual"))
    ]
    qualities = [quality(0.2, 1.004), quality(0.21, 1.2), quality(0.3, 1.009), quality(0.4, 1.02)]
    asked = []

    def measure(floor, level, scale):
        asked.append((floor.name, level.name, scale))
        return 0.3 + scale / 100, 1.009 + scale / 5000

    def find(**target):
        asked.clear()
        return find_tier("mine", Target(**target), levels, qualities, [1.0, 3.0, 9.0], measure)

    def allow(ratio):  # the ratio that leaves `ratio` after the search's margin
        return 1 + (ratio - 1) / 0.85

    assert find(max_ratio=allow(1.003)) == TierRecord(name="mine", floor="full", level="full")
    tier = find(max_ratio=allow(1.0099))  # at scale 9 the bound is passed; c-20's tries end the same way
    assert (tier.floor, tier.level, tier.threshold_scale) == ("c-30", "c-40", 3.0)
    assert asked[:3] == [("c-30", "c-40", 1.0), ("c-30", "c-40", 3.0), ("c-30", "c-40", 9.0)]
    tier = find(max_ratio=allow(1.03))
    assert (tier.floor, tier.level) == ("c-40", "c-40")
    tier = find(min_saved=0.3)  # a level alone does it at 1.009
    assert (tier.floor, tier.level) == ("c-30", "c-30")
    tier = find(min_saved=0.35)  # 9 is the first scale that saves enough, and cheaper than c-40 for all
    assert (tier.floor, tier.level, tier.threshold_scale) == ("c-30", "c-40", 9.0)
    assert find(min_saved=0.9) == TierRecord(name="mine", floor="full", level="full")


def test_thresholds_give_the_exit_rates():
    risks = {1: torch.arange(1000.0) + 1, 4: torch.arange(1000.0).flip(0) + 1}
    thresholds = set_thresholds(risks, [0.2, 0.5])
    first = risks[1] < thresholds[1]
    assert first.float().mean().item() == pytest.approx(0.2, abs=2e-3)
    assert (risks[4][~first] < thresholds[4]).float().mean().item() == pytest.approx(0.5, abs=2e-3)
    assert set_thresholds(risks, [0.0, 0.1])[1] == 0.0


class FixedProbe(torch.nn.Module):
    """A probe whose risks are given."""

    def __init__(self, risk_T):
        super().__init__()
        self.risk_T = torch.tensor(risk_T)

    def forward(self, stream_TD):
        assert len(stream_TD) == len(self.risk_T)
        return self.risk_T


@torch.inference_mode()
def test_decided_tokens_stay_decided_and_batches_wait_for_all(model, text_files):
    (batch,) = model.make_batches([p.read_text() for p in text_files[:2]], max_length=3)
    assert batch.real_BS.shape == (2, 3)
    probes = {0: FixedProbe([0.1, 0.9, 0.9, 0.1, 0.1, 0.9]), 1: FixedProbe([0.9, 0.1, 0.9, 0.9, 0.1, 0.9])}
    knobs = lambda scope: {layer: Knobs(threshold=0.5, scope=scope) for layer in probes}  # noqa: E731
    each, group = Decided(probes, knobs("token")), Decided(probes, knobs("batch"))
    # Of three layers, a token that exits after the first skips two, one that exits after the second skips one.
    assert model.run(batch, each)[1] == pytest.approx(1 - (3 * 2 + 1) / 18)
    assert each.num_decided == {0: 3, 1: 1}
    # Positions 0 and 1 of both sequences: only position 0 agrees at the first, position 1 at the second.
    assert model.run(batch, group)[1] == pytest.approx(1 - (2 * 2 + 2) / 18)
    randomly = Randomly(each)
    assert model.run(batch, randomly)[1] == model.run(batch, randomly)[1]
