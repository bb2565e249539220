"""A probe set comes back as it was written; anything wrong with it is refused whole."""

from __future__ import annotations

import hashlib
import json

import pytest
import safetensors.torch
import torch
from sedac.errors import ArtifactError
from sedac.probe import artifact
from sedac.probe.levels import Level, Neurons
from sedac.probe.manifest import LevelRecord, Manifest, ProbeRecord, TierRecord, read_manifest
from sedac.probe.probe import LREProbe


@pytest.fixture
def probe_set(tmp_path):
    probes = {layer: LREProbe(32, 8) for layer in (1, 3)}
    records = tuple(ProbeRecord(layer=layer, threshold=0.5) for layer in probes)
    artifact.save(tmp_path / "set", Manifest(name="t", model="m", hidden_size=32, num_layers=6, rank=8, target="x", probes=records), probes)
    return tmp_path / "set", probes


def test_loads_what_was_saved(probe_set):
    directory, probes = probe_set
    loaded = artifact.load(directory)
    assert loaded.manifest.probes == (ProbeRecord(layer=1, threshold=0.5), ProbeRecord(layer=3, threshold=0.5))
    stream = torch.randn(5, 32)
    for layer, probe in probes.items():
        assert torch.equal(loaded.probes[layer](stream), probe(stream))


def test_stays_fp32_under_another_default_dtype(probe_set):
    torch.set_default_dtype(torch.bfloat16)
    try:
        loaded = artifact.load(probe_set[0])
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for probe in loaded.probes.values() for p in probe.parameters()} == {torch.float32}
    assert loaded.probes[1](torch.randn(2, 32, dtype=torch.bfloat16)).dtype == torch.float32


def test_every_flipped_byte_is_refused(probe_set):
    path = probe_set[0] / artifact.WEIGHTS
    good = path.read_bytes()
    for position in range(0, len(good), 7):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        with pytest.raises(ArtifactError, match="copy the probe set again"):
            artifact.load(probe_set[0])
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(ArtifactError, match="copy the probe set again"):
        artifact.load(probe_set[0])


@pytest.mark.parametrize(
    ("field", "value"),
    [("format", "other/1"), ("name", "../x"), ("hidden_size", 0), ("rank", 10**6), ("probes", []), ("hidden_size", "wide"), ("surprise", 1)],
)
def test_bad_manifest_fields_are_refused(probe_set, field, value):
    path = probe_set[0] / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ArtifactError, match="sedac-probes"):
        read_manifest(probe_set[0])


def test_wrong_shapes_and_nan_are_refused(probe_set):
    directory, _ = probe_set
    manifest = artifact.load(directory).manifest
    for bad, reason in ((LREProbe(32, 4), r"expected float32 \(8, 32\)"), (LREProbe(32, 8), "NaN or infinity")):
        bad.out.weight.data.fill_(float("nan"))
        artifact.save(directory, manifest, {1: bad, 3: LREProbe(32, 8)})
        with pytest.raises(ArtifactError, match=reason):
            artifact.load(directory)


def test_missing_layer_and_legacy_pickles_are_named(probe_set, tmp_path):
    with pytest.raises(ArtifactError, match=r"SEDAC probe missing for layer 2: .* has layers \[1, 3\]"):
        artifact.load(probe_set[0], (1, 2))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "sedac_probe_layer7.pth").write_bytes(b"pickle")
    with pytest.raises(ArtifactError, match=r"sedac_probe_layer7\.pth.*never loaded"):
        artifact.load(tmp_path / "old")


LAYERS, SIZE, HIDDEN = 6, 16, 32


@pytest.fixture
def levelled_set(tmp_path):
    generator = torch.Generator().manual_seed(0)
    levels = (
        Level(name="contextual-30", reduction="contextual", parameters_L=torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, float("inf")])),
        Level(name="width-40", reduction="width", parameters_L=torch.tensor([16, 8, 8, 4, 1, 0], dtype=torch.int32)),
    )
    neurons = {
        layer: Neurons(
            order_F=torch.randperm(SIZE, generator=generator).to(torch.int32),
            scale_F=torch.rand(SIZE, generator=generator),
            repair_FD=torch.randn(SIZE, HIDDEN, generator=generator).to(torch.bfloat16) if layer % 2 else None,
        )
        for layer in range(LAYERS)
    }
    manifest = Manifest(
        name="t",
        model="m",
        hidden_size=HIDDEN,
        num_layers=LAYERS,
        rank=8,
        target="x",
        probes=(ProbeRecord(layer=1, threshold=0.5),),
        intermediate_size=SIZE,
        activation="silu",
        score="activation",
        levels=(
            LevelRecord(name="contextual-30", reduction="contextual", saved=0.3, perplexity_ratio=1.005, metrics={"kl": 0.004}),
            LevelRecord(name="width-40", reduction="width", saved=0.4, perplexity_ratio=1.05),
        ),
        tiers=(TierRecord(name="balanced", floor="contextual-30", level="width-40"),),
    )
    return (
        tmp_path / "levelled",
        artifact.save(tmp_path / "levelled", manifest, {1: LREProbe(HIDDEN, 8)}, levels=levels, neurons=neurons),
        levels,
        neurons,
    )


def test_levels_come_back_as_they_were_saved(levelled_set):
    directory, manifest, levels, neurons = levelled_set
    loaded = artifact.load(directory)
    assert loaded.manifest == manifest
    assert [(level.name, level.reduction) for level in loaded.levels] == [("contextual-30", "contextual"), ("width-40", "width")]
    for level, found in zip(levels, loaded.levels, strict=True):
        assert found.parameters_L.dtype == level.parameters_L.dtype
        assert torch.equal(found.parameters_L, level.parameters_L)
    assert set(loaded.neurons) == set(range(LAYERS))
    for layer, known in neurons.items():
        found = loaded.neurons[layer]
        assert torch.equal(found.order_F, known.order_F)
        assert torch.equal(found.scale_F, known.scale_F)
        assert (found.repair_FD is None) == (known.repair_FD is None)
        assert known.repair_FD is None or torch.equal(found.repair_FD, known.repair_FD)


def test_a_set_without_levels_stays_valid(probe_set):
    loaded = artifact.load(probe_set[0])
    assert loaded.levels == ()
    assert loaded.neurons == {}


@pytest.mark.parametrize(
    ("tensor", "value", "reason"),
    [
        ("levels.contextual-30.threshold", None, "no tensor"),
        ("levels.contextual-30.threshold", torch.zeros(5), r"\(5,\), expected float32 \(6,\)"),
        ("levels.contextual-30.threshold", torch.zeros(6, dtype=torch.float64), "float64"),
        ("levels.contextual-30.threshold", torch.full((6,), -0.1), "below 0 or NaN"),
        ("levels.contextual-30.threshold", torch.full((6,), float("nan")), "below 0 or NaN"),
        ("levels.width-40.neurons", None, "no tensor"),
        ("levels.width-40.neurons", torch.full((6,), 8), "int64"),
        ("levels.width-40.neurons", torch.full((6,), 17, dtype=torch.int32), r"outside 0\.\.16"),
        ("levels.width-40.neurons", torch.full((6,), -1, dtype=torch.int32), r"outside 0\.\.16"),
        ("neurons.3.order", None, "no tensor"),
        ("neurons.3.order", torch.zeros(16, dtype=torch.int32), "no permutation"),
        ("neurons.3.order", torch.arange(1, 17, dtype=torch.int32), "no permutation"),
        ("neurons.3.order", torch.arange(16), "int64"),
        ("neurons.3.scale", None, "no tensor"),
        ("neurons.3.scale", torch.full((16,), float("inf")), "NaN, infinity or a negative"),
        ("neurons.3.scale", torch.full((16,), -1.0), "NaN, infinity or a negative"),
        ("neurons.3.scale", torch.ones(8), r"\(8,\), expected"),
        ("neurons.3.repair", torch.zeros(16, 31, dtype=torch.bfloat16), r"\(16, 31\), expected"),
        ("neurons.3.repair", torch.zeros(16, 32), "float32"),
        ("neurons.3.repair", torch.full((16, 32), float("nan"), dtype=torch.bfloat16), "NaN or infinity"),
    ],
)
def test_each_wrong_tensor_is_named_and_refused(levelled_set, tensor, value, reason):
    directory = levelled_set[0]
    tensors = safetensors.torch.load_file(directory / artifact.WEIGHTS)
    assert tensor in tensors
    data = safetensors.torch.save(
        {name: t for name, t in (tensors | {tensor: value}).items() if t is not None}, metadata={"format": "sedac-probe-set/1"}
    )
    (directory / artifact.WEIGHTS).write_bytes(data)
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sha256": hashlib.sha256(data).hexdigest()}))
    with pytest.raises(ArtifactError, match=rf"{tensor} .*{reason}.*; calibrate the set again"):
        artifact.load(directory)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("intermediate_size", lambda m: m | {"intermediate_size": 0}),
        ("activation", lambda m: m | {"activation": "relu"}),
        ("activation", lambda m: m | {"activation": ""}),
        ("score", lambda m: m | {"score": "up"}),
        ("levels", lambda m: m | {"levels": [m["levels"][0] | {"name": f"l{i}"} for i in range(15)]}),
        ("levels.name", lambda m: m | {"levels": [m["levels"][0] | {"name": "skip"}], "tiers": []}),
        ("levels.name", lambda m: m | {"levels": [m["levels"][0], m["levels"][0]]}),
        ("levels.reduction", lambda m: m | {"levels": [m["levels"][0] | {"reduction": "depth"}]}),
        ("levels.saved", lambda m: m | {"levels": [m["levels"][0] | {"saved": 1.5}]}),
        ("levels.perplexity_ratio", lambda m: m | {"levels": [m["levels"][0] | {"perplexity_ratio": 0}]}),
        ("tiers.floor", lambda m: m | {"tiers": [m["tiers"][0] | {"floor": "skip"}]}),
        ("tiers.level", lambda m: m | {"tiers": [m["tiers"][0] | {"level": "contextual-99"}]}),
        ("tiers.threshold_scale", lambda m: m | {"tiers": [m["tiers"][0] | {"threshold_scale": -1}]}),
    ],
)
def test_bad_level_and_tier_fields_are_refused(levelled_set, field, change):
    path = levelled_set[0] / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ArtifactError, match=rf"field {field} is out of range.*sedac-probes"):
        read_manifest(levelled_set[0])
