"""Reduced levels in a probe set: they come back as they were written; any tensor or field at fault refuses the whole set by name."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
import safetensors.torch
import torch
from sedac.errors import ArtifactError
from sedac.probe import artifact
from sedac.probe.levels import Level, Neurons
from sedac.probe.manifest import LevelRecord, Manifest, ProbeRecord, TierRecord, read_manifest
from sedac.probe.probe import LREProbe

L, F, D = 3, 10, 16
LEVELS = (
    Level(name="width-20", reduction="width", parameters_L=torch.tensor([F, 8, 0], dtype=torch.int32)),
    Level(name="contextual-30", reduction="contextual", parameters_L=torch.tensor([0.0, 0.25, math.inf])),
)
NEURONS = {
    n: Neurons(order_F=torch.randperm(F).int(), scale_F=torch.rand(F), repair_FD=torch.randn(F, D).bfloat16() if n else None) for n in range(L)
}
MANIFEST = Manifest(
    name="t", model="m", hidden_size=D, num_layers=L, rank=4, target="x", probes=(ProbeRecord(layer=1, threshold=0.5),),
    intermediate_size=F, activation="silu", score="activation",
    levels=(
        LevelRecord(name="width-20", reduction="width", saved=0.2, perplexity_ratio=1.002, metrics={"kl": 0.001}),
        LevelRecord(name="contextual-30", reduction="contextual", saved=0.3, perplexity_ratio=1.008),
    ),
    tiers=(
        TierRecord(name="balanced", floor="width-20", level="contextual-30"),
        TierRecord(name="bold", floor="full", level="skip", threshold_scale=2.0),
    ),
)  # fmt: skip


@pytest.fixture
def level_set(tmp_path):
    artifact.save(tmp_path / "set", MANIFEST, {1: LREProbe(D, 4)}, levels=LEVELS, neurons=NEURONS)
    return tmp_path / "set"


def rewrite(directory, changes):
    """Change tensors (None: remove) and make the digest good again, as a writer with a fault would."""
    tensors = safetensors.torch.load_file(directory / artifact.WEIGHTS) | changes
    data = safetensors.torch.save({name: t for name, t in tensors.items() if t is not None}, metadata={"format": "sedac-probe-set/1"})
    (directory / artifact.WEIGHTS).write_bytes(data)
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sha256": hashlib.sha256(data).hexdigest()}))


def test_comes_back_as_it_was_written(level_set):
    loaded = artifact.load(level_set)
    assert (loaded.manifest.levels, loaded.manifest.tiers) == (MANIFEST.levels, MANIFEST.tiers)
    assert (loaded.manifest.activation, loaded.manifest.score, loaded.manifest.intermediate_size) == ("silu", "activation", F)
    assert [(level.name, level.reduction) for level in loaded.levels] == [(level.name, level.reduction) for level in LEVELS]
    for level, written in zip(loaded.levels, LEVELS, strict=True):
        assert level.parameters_L.dtype == written.parameters_L.dtype
        assert torch.equal(level.parameters_L, written.parameters_L)
    assert sorted(loaded.neurons) == list(range(L))
    for layer, neurons in loaded.neurons.items():
        assert torch.equal(neurons.order_F, NEURONS[layer].order_F)
        assert torch.equal(neurons.scale_F, NEURONS[layer].scale_F)
    assert loaded.neurons[0].repair_FD is None
    assert all(torch.equal(loaded.neurons[n].repair_FD, NEURONS[n].repair_FD) for n in (1, 2))


def test_a_set_of_before_has_no_levels(tmp_path):
    """Sets written before there were levels lack the fields altogether."""
    manifest = Manifest(name="t", model="m", hidden_size=D, num_layers=L, rank=4, target="x", probes=MANIFEST.probes)
    artifact.save(tmp_path, manifest, {1: LREProbe(D, 4)})
    path = tmp_path / "manifest.json"
    new = {"intermediate_size", "activation", "score", "levels", "tiers"}
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in new}))
    loaded = artifact.load(tmp_path)
    assert (loaded.levels, loaded.neurons, loaded.manifest.tiers, loaded.manifest.intermediate_size) == ((), {}, (), 0)


def test_an_unchanged_rewrite_is_accepted(level_set):
    rewrite(level_set, {})  # otherwise the refusals below would prove nothing
    assert len(artifact.load(level_set).levels) == 2


@pytest.mark.parametrize(
    ("name", "tensor", "problem"),
    [
        ("neurons.0.order", None, "no tensor, expected int32"),
        ("neurons.0.order", torch.arange(F), "int64"),
        ("neurons.0.order", torch.arange(F - 1, dtype=torch.int32), r"\(9,\), expected int32 \(10,\)"),
        ("neurons.1.order", torch.zeros(F, dtype=torch.int32), r"no permutation of 0\.\.9"),
        ("neurons.1.order", torch.arange(F, dtype=torch.int32) + 1, r"no permutation of 0\.\.9"),
        ("neurons.2.scale", None, "no tensor"),
        ("neurons.2.scale", torch.ones(F, dtype=torch.float64), "float64"),
        ("neurons.2.scale", torch.ones(F, 1), r"\(10, 1\)"),
        ("neurons.2.scale", torch.full((F,), math.nan), "NaN, infinity or a negative number"),
        ("neurons.2.scale", torch.full((F,), math.inf), "NaN, infinity or a negative number"),
        ("neurons.2.scale", -torch.ones(F), "NaN, infinity or a negative number"),
        ("neurons.1.repair", torch.ones(F, D), "float32"),
        ("neurons.1.repair", torch.ones(D, F).bfloat16(), r"\(16, 10\), expected bfloat16 \(10, 16\)"),
        ("neurons.1.repair", torch.full((F, D), math.inf).bfloat16(), "NaN or infinity"),
        ("neurons.1.repair", torch.full((F, D), math.nan).bfloat16(), "NaN or infinity"),
        ("levels.width-20.neurons", None, "no tensor"),
        ("levels.width-20.neurons", torch.ones(L), "float32"),
        ("levels.width-20.neurons", torch.ones(L + 1, dtype=torch.int32), r"\(4,\)"),
        ("levels.width-20.neurons", torch.tensor([F + 1, 0, 0], dtype=torch.int32), r"counts outside 0\.\.10"),
        ("levels.width-20.neurons", torch.tensor([-1, 0, 0], dtype=torch.int32), r"counts outside 0\.\.10"),
        ("levels.contextual-30.threshold", None, "no tensor"),
        ("levels.contextual-30.threshold", torch.ones(L).half(), "float16"),
        ("levels.contextual-30.threshold", torch.tensor(0.5), r"\(\), expected float32 \(3,\)"),
        ("levels.contextual-30.threshold", torch.tensor([0.1, math.nan, 0.1]), "below 0 or NaN"),
        ("levels.contextual-30.threshold", torch.tensor([0.1, -math.inf, 0.1]), "below 0 or NaN"),
    ],
)
def test_tensors_at_fault_are_named(level_set, name, tensor, problem):
    rewrite(level_set, {name: tensor})
    with pytest.raises(ArtifactError, match=rf"probes\.safetensors: {name} .*{problem}.*calibrate the set again"):
        artifact.load(level_set)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("intermediate_size", 0),
        ("intermediate_size", -1),
        ("activation", ""),
        ("activation", "relu"),
        ("score", "up"),
        ("levels", [{"name": f"w{i}", "reduction": "width", "saved": 0.1, "perplexity_ratio": 1.0} for i in range(15)]),
    ],
)
def test_manifest_fields_at_fault_are_named(level_set, field, value):
    path = level_set / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ArtifactError, match=rf"field {field} .*sedac-probes"):
        read_manifest(level_set)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("levels", "name", "full"),
        ("levels", "name", "skip"),
        ("levels", "name", "contextual-30"),
        ("levels", "name", "../x"),
        ("levels", "reduction", "lowrank"),
        ("levels", "saved", 1.5),
        ("levels", "saved", math.nan),
        ("levels", "perplexity_ratio", 0.0),
        ("levels", "perplexity_ratio", math.inf),
        ("tiers", "floor", "skip"),
        ("tiers", "floor", "width-99"),
        ("tiers", "level", "width-99"),
        ("tiers", "threshold_scale", -1.0),
        ("tiers", "threshold_scale", math.nan),
    ],
)
def test_records_at_fault_are_named(level_set, part, field, value):
    path = level_set / "manifest.json"
    data = json.loads(path.read_text())
    data[part][0][field] = value
    if field == "name":
        data["tiers"] = []  # tiers that name the old one would be refused first
    path.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=rf"field {part}\.{field} "):
        read_manifest(level_set)
