"""A probe set comes back as it was written; anything wrong with it is refused whole."""

from __future__ import annotations

import json

import pytest
import torch
from sedac.errors import ArtifactError
from sedac.probe import artifact
from sedac.probe.manifest import Manifest, ProbeRecord, read_manifest
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
