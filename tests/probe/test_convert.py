"""The earlier versions' files come in and go out bit for bit; whatever is wrong with them is refused whole, and no pickle is ever run."""

from __future__ import annotations

import json
import os

import pytest
import safetensors.torch
import torch
from sedac.errors import SedacError
from sedac.probe import artifact
from sedac.probe.manifest import Manifest, ProbeRecord
from sedac.probe.probe import LREProbe
from sedac_probes.cli import app
from sedac_probes.legacy.convert import convert
from sedac_probes.training.train import read_collection
from torch import nn
from typer.testing import CliRunner

HIDDEN, RANK, LAYERS = 32, 8, (2, 5)


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"num_hidden_layers": 6, "hidden_size": HIDDEN}))
    return str(path)


class EarlierProbe(nn.Module):
    """As the earlier versions wrote it."""

    def __init__(self, hidden_size=HIDDEN, rank=RANK):
        super().__init__()
        self.proj = nn.Linear(hidden_size, rank, bias=False)
        self.norm = nn.LayerNorm(rank)
        self.head = nn.Linear(rank, 1)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, stream):
        return nn.functional.softplus(self.head(self.norm(self.proj(stream)))).squeeze(-1)


@pytest.fixture
def earlier(tmp_path):
    directory = tmp_path / "sedac_data"
    directory.mkdir()
    probes = {layer: EarlierProbe() for layer in LAYERS}
    for layer, probe in probes.items():
        torch.save(probe.state_dict(), directory / f"sedac_probe_layer{layer}.pth")
    return directory, probes


def assert_same_probes(found, expected):
    assert found.keys() == expected.keys()
    for layer, probe in expected.items():
        ours, theirs = probe.state_dict(), found[layer].state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_refused(tmp_path, match, *args, **kwargs):
    """Convert, expect one clear line, and find nothing new on the disk."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SedacError, match=match) as caught:
        convert(*args, **kwargs)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_probes_come_in_and_go_out_bit_for_bit(earlier, tmp_path, model):
    source, probes = earlier
    (source / "sedac_config.json").write_text(json.dumps({"method": "v6", "v6_thresholds": {"2": 0.75, "5": 1.25, "9": 3}}))
    made = convert(source, tmp_path / "set", model=model, name="old")
    assert (made.kind, made.layers, made.notes) == ("probe set", LAYERS, ())
    loaded = artifact.load(tmp_path / "set")
    assert (loaded.manifest.hidden_size, loaded.manifest.num_layers, loaded.manifest.rank, loaded.manifest.name) == (HIDDEN, 6, RANK, "old")
    assert [(p.layer, p.threshold) for p in loaded.manifest.probes] == [(2, 0.75), (5, 1.25)]
    stream = torch.randn(64, HIDDEN)
    for layer, probe in probes.items():
        assert torch.equal(loaded.probes[layer](stream), probe(stream))
    convert(tmp_path / "set", tmp_path / "back")
    for layer, probe in probes.items():
        strict = EarlierProbe()
        strict.load_state_dict(torch.load(tmp_path / "back" / f"sedac_probe_layer{layer}.pth", weights_only=True))
        assert all(torch.equal(a, b) for a, b in zip(strict.state_dict().values(), probe.state_dict().values(), strict=True))
    convert(tmp_path / "back", tmp_path / "again", model=model, name="old")
    assert_same_probes(artifact.load(tmp_path / "again").probes, loaded.probes)
    assert artifact.load(tmp_path / "again").manifest.probes == loaded.manifest.probes


def test_a_probe_set_of_ours_comes_back(tmp_path, model):
    records = tuple(ProbeRecord(layer=layer, threshold=0.1 * layer) for layer in LAYERS)
    manifest = Manifest(name="ours", model="m", hidden_size=HIDDEN, num_layers=6, rank=RANK, target="x", probes=records)
    probes = {layer: LREProbe(HIDDEN, RANK) for layer in LAYERS}
    artifact.save(tmp_path / "set", manifest, probes)
    convert(tmp_path / "set", tmp_path / "old")
    convert(tmp_path / "old", tmp_path / "back", model=model, name="ours")
    back = artifact.load(tmp_path / "back")
    assert_same_probes(back.probes, probes)
    assert back.manifest.probes == records


SPELLINGS = {
    "sequential": ("0.weight", "1.weight", "1.bias", "2.weight", "2.bias"),
    "net": ("net.0.weight", "net.1.weight", "net.1.bias", "net.2.weight", "net.2.bias"),
    "ours": ("down.weight", "norm.weight", "norm.bias", "out.weight", "out.bias"),
    "compiled": tuple(f"_orig_mod.{n}" for n in ("proj.weight", "norm.weight", "norm.bias", "head.weight", "head.bias")),
    "by shape": ("a.weight", "b.weight", "b.bias", "c.weight", "c.bias"),
    "by shape, gamma": ("w1", "gamma", "beta", "w2", "b2"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("nested", ["", "state_dict", "model_state_dict"])
def test_usual_spellings_are_understood(earlier, tmp_path, model, spelling, nested):
    source, probes = earlier
    for layer, probe in probes.items():
        state = dict(zip(SPELLINGS[spelling], probe.state_dict().values(), strict=True))
        torch.save({nested: state, "epoch": 3} if nested else state, source / f"sedac_probe_layer{layer}.pth")
    convert(source, tmp_path / "set", model=model)
    stream = torch.randn(16, HIDDEN)
    for layer, probe in probes.items():
        assert torch.equal(artifact.load(tmp_path / "set").probes[layer](stream), probe(stream))


def test_ambiguous_tensors_are_refused(earlier, tmp_path, model):
    source, _ = earlier
    path = source / "sedac_probe_layer2.pth"
    vectors = {"w1": torch.randn(RANK, HIDDEN), "v1": torch.randn(RANK), "v2": torch.randn(RANK), "w2": torch.randn(1, RANK), "b": torch.randn(1)}
    rank_1 = {
        "a.weight": torch.randn(1, 1),
        "b.weight": torch.randn(1),
        "b.bias": torch.randn(1),
        "c.weight": torch.randn(1, 1),
        "c.bias": torch.randn(1),
    }
    for state in (vectors, rank_1):
        torch.save(state, path)
        assert_refused(tmp_path, "layer2.pth does not tell which tensor is which.*name them proj.weight", source, tmp_path / "set", model=model)
    torch.save(EarlierProbe().state_dict() | {"proj.bias": torch.zeros(RANK)}, path)
    assert_refused(tmp_path, "layer2.pth holds 6 tensors .*an LREProbe has 5", source, tmp_path / "set", model=model)
    torch.save(EarlierProbe().state_dict() | {"norm.weight": torch.zeros(RANK + 1)}, path)
    assert_refused(tmp_path, r"norm.weight is \(9,\), expected \(8,\)", source, tmp_path / "set", model=model)


class Trap:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", ["sedac_probe_layer2.pth", "hidden_states_layer2.pt", "entropies_layer2.pt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_never_run(tmp_path, model, name, zipped):
    source, trap = tmp_path / "old", tmp_path / "trap"
    source.mkdir()
    if name.startswith("entropies"):
        torch.save(torch.randn(4, HIDDEN), source / "hidden_states_layer2.pt")
    torch.save({"state_dict": EarlierProbe().state_dict(), "extra": Trap(trap)}, source / name, _use_new_zipfile_serialization=zipped)
    assert_refused(tmp_path, rf"{name} holds \S*system: refused, nothing of it was run", source, tmp_path / "out", model=model)
    assert not trap.exists()
    torch.load(source / name, weights_only=False)  # it goes off where it is let out
    assert trap.exists()


def test_thresholds_option_then_file_then_off(earlier, tmp_path, model):
    source, _ = earlier
    run = CliRunner().invoke(app, ["convert", str(source), "--model", model, "--out", str(tmp_path / "a"), "--threshold", "5=0.25"])
    assert run.exit_code == 0
    assert "no threshold is known for layers [2]: they are 0" in run.stderr
    assert [p.threshold for p in artifact.load(tmp_path / "a").manifest.probes] == [0, 0.25]
    (source / "sedac_config.json").write_text(json.dumps({"thresholds": [0.5, 0.75]}))
    assert convert(source, tmp_path / "b", model=model, thresholds={5: 1.0}).notes == ()
    assert [p.threshold for p in artifact.load(tmp_path / "b").manifest.probes] == [0.5, 1.0]
    assert_refused(tmp_path, r"--threshold names layers \[9\], the probes are of \[2, 5\]", source, tmp_path / "c", model=model, thresholds={9: 1.0})
    assert_refused(tmp_path, "finite and at least 0", source, tmp_path / "c", model=model, thresholds={2: float("nan")})
    for bad in ({"v6_thresholds": {"2": -1}}, {"v6_thresholds": {"2": "much"}}, {"thresholds": [1]}, [1]):
        (source / "sedac_config.json").write_text(json.dumps(bad))
        assert_refused(tmp_path, "sedac_config.json", source, tmp_path / "c", model=model)


def test_broken_probes_are_refused_whole(earlier, tmp_path, model):
    source, probes = earlier
    path, out = source / "sedac_probe_layer5.pth", tmp_path / "set"
    good = path.read_bytes()
    torch.save(EarlierProbe(hidden_size=48).state_dict(), path)
    assert_refused(tmp_path, r"layer5.pth is for hidden size 48, .*model has 32", source, out, model=model)
    torch.save(EarlierProbe(rank=4).state_dict(), path)
    assert_refused(tmp_path, r"ranks \{2: 8, 5: 4\}, a probe set has one rank.*--layers", source, out, model=model)
    bad = {k: v.clone() for k, v in probes[5].state_dict().items()}
    bad["norm.bias"][3] = float("nan")
    torch.save(bad, path)
    assert_refused(tmp_path, "layer5.pth: norm.bias holds 1 NaN or infinite values", source, out, model=model)
    for broken in (good[: len(good) // 2], b"", b"not a pickle"):
        path.write_bytes(broken)
        assert_refused(tmp_path, "sedac_probe_layer5.pth", source, out, model=model)
    path.write_bytes(good)
    assert_refused(tmp_path, r"of layers \[2, 5\], not of \[3\]", source, out, model=model, layers=(2, 3))
    path.rename(source / "sedac_probe_layer11.pth")
    assert_refused(tmp_path, "layer11.pth is of layer 11, .* has layers 0 to 5", source, out, model=model)
    assert_refused(tmp_path, "name it with --model", source, out)
    assert_refused(tmp_path, "can't be read as a model's config", source, out, model=str(tmp_path / "no-model"))
    assert_refused(tmp_path, "field name is out of range", source, out, model=model, layers=(2,), name="Has Spaces")
    assert_refused(tmp_path, "exists; name another directory", source, tmp_path / "model", model=model, layers=(2,))
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path, "has no sedac_probe_layerN.pth or hidden_states_layerN.pt files", tmp_path / "empty", out, model=model)


def test_a_full_disk_leaves_nothing(earlier, tmp_path, model, monkeypatch):
    source, _ = earlier

    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", fail)  # the manifest is written last
    assert_refused(tmp_path, "can't be written .*No space left.*nothing was kept", source, tmp_path / "set", model=model)


FORMS = {
    "files beside each other": lambda h, e: (h, e),
    "dict": lambda h, e: ({"hidden_states": h, "entropies": e}, None),
    "pair": lambda h, e: ([h, e], None),
    "dict of lists": lambda h, e: ({"hidden_states": list(h.split(7)), "entropies": list(e.split(7))}, None),
    "list of dicts": lambda h, e: ([{"hidden_states": a, "entropy": b} for a, b in zip(h.split(7), e.split(7), strict=True)], None),
}


@pytest.mark.parametrize("form", FORMS)
def test_streams_come_in_and_train_reads_them(tmp_path, model, form):
    source = tmp_path / "old"
    source.mkdir()
    entropies, streams = torch.rand(1100), {layer: torch.randn(1100, HIDDEN).half() for layer in LAYERS}
    for layer, stream in streams.items():
        data, beside = FORMS[form](stream, entropies)
        torch.save(data, source / f"hidden_states_layer{layer}.pt")
        if beside is not None:
            torch.save(beside, source / f"entropies_layer{layer}.pt")
    made = convert(source, tmp_path / "streams", model=model)
    assert (made.kind, made.layers) == ("collection", LAYERS)
    assert "every 512 rows are taken for one document" in made.notes[0]
    for layer, stream in streams.items():
        read, target, document = read_collection(tmp_path / "streams", layer)
        assert torch.equal(read, stream.float())
        assert torch.equal(target, entropies.log1p())
        assert document.bincount().tolist() == [512, 512, 76]


def test_a_collection_goes_out_and_comes_back_bit_for_bit(tmp_path, model):
    ours = tmp_path / "streams"
    ours.mkdir()
    description = {"model": model, "layers": [2, 5], "num_documents": 3, "max_length": 7, "hidden_size": HIDDEN, "num_layers": 6, "data_digest": "x"}
    (ours / "collection.json").write_text(json.dumps(description))
    document = torch.tensor([0] * 7 + [1] * 3 + [2] * 5)
    position = torch.cat([torch.arange(n) for n in (7, 3, 5)])
    whole = {"document": document, "position": position, "entropy": torch.rand(15)}
    whole |= {f"stream.{layer}": torch.randn(15, HIDDEN).bfloat16() for layer in LAYERS}
    more = {"top_logprob": torch.rand(15, 4), "statistics.up.0": torch.rand(15)}
    for number, rows in enumerate((slice(0, 10), slice(10, 15))):
        safetensors.torch.save_file({k: t[rows].contiguous() for k, t in (whole | more).items()}, ours / f"shard-{number:05d}.safetensors")
    notes = convert(ours, tmp_path / "old").notes
    assert notes == ("statistics, top_logprob stay behind: the earlier layout has no place for them",)
    assert torch.equal(torch.load(tmp_path / "old" / "hidden_states_layer5.pt", weights_only=True), whole["stream.5"])
    assert torch.equal(torch.load(tmp_path / "old" / "entropies_layer2.pt", weights_only=True), whole["entropy"])
    assert convert(tmp_path / "old", tmp_path / "back", model=model).notes == ()
    back = safetensors.torch.load_file(tmp_path / "back" / "shard-00000.safetensors")
    assert back.keys() == whole.keys()
    assert all(torch.equal(back[key], tensor) and back[key].dtype == tensor.dtype for key, tensor in whole.items())
    described = json.loads((tmp_path / "back" / "collection.json").read_text())
    assert {k: described[k] for k in description if k != "data_digest"} == {k: v for k, v in description.items() if k != "data_digest"}


def test_a_broken_collection_is_refused_whole(tmp_path):
    ours, out = tmp_path / "streams", tmp_path / "old"
    ours.mkdir()
    tensors = {"document": torch.zeros(4).long(), "position": torch.arange(4), "entropy": torch.rand(4), "stream.2": torch.randn(4, HIDDEN)}
    path, description = ours / "shard-00000.safetensors", ours / "collection.json"
    description.write_text(json.dumps({"layers": [2], "num_shards": 1}))
    assert_refused(tmp_path, "has 0 of 1 shards", ours, out)
    safetensors.torch.save_file(tensors, path)
    assert_refused(tmp_path, r"--layers names \[5\], .* has layers \[2\]", ours, out, layers=(5,))
    good = path.read_bytes()
    path.write_bytes(good[:-8])
    assert_refused(tmp_path, "can't be read as a collection", ours, out)
    safetensors.torch.save_file({k: t for k, t in tensors.items() if k != "stream.2"}, path)
    assert_refused(tmp_path, "some lack one of .*stream.2", ours, out)
    tensors["stream.2"][1, 1] = float("inf")
    safetensors.torch.save_file(tensors, path)
    assert_refused(tmp_path, "stream.2 holds 1 NaN or infinite", ours, out)
    description.write_text("{")
    assert_refused(tmp_path, "can't be read as a collection", ours, out)


def test_broken_streams_are_refused_whole(tmp_path, model):
    source, out = tmp_path / "old", tmp_path / "streams"
    source.mkdir()
    path = source / "hidden_states_layer2.pt"
    streams, entropies = torch.randn(20, HIDDEN), torch.rand(20)
    torch.save(streams, path)
    assert_refused(tmp_path, "has no entropies, and there is no entropies_layer2.pt beside it", source, out, model=model)
    torch.save({"hidden_states": torch.randn(20, 48), "entropies": entropies}, path)
    assert_refused(tmp_path, "is for hidden size 48", source, out, model=model)
    torch.save({"hidden_states": streams, "entropies": entropies[:9]}, path)
    assert_refused(tmp_path, r"\(20, 32\) and entropies \(9,\) don't belong together", source, out, model=model)
    torch.save({"hidden_states": torch.full((20, HIDDEN), float("nan")), "entropies": entropies}, path)
    assert_refused(tmp_path, "hidden states holds 640 NaN or infinite values", source, out, model=model)
    torch.save({"hidden_states": streams, "entropies": entropies}, path)
    torch.save({"hidden_states": streams, "entropies": entropies + 1}, source / "hidden_states_layer5.pt")
    assert_refused(tmp_path, "other entropies than layer 2.*convert them apart with --layers", source, out, model=model)
    assert convert(source, out, model=model, layers=(5,)).layers == (5,)
    torch.save(EarlierProbe().state_dict(), source / "sedac_probe_layer2.pth")
    assert_refused(tmp_path, "holds probes and streams; say --part", source, tmp_path / "two", model=model)
    assert convert(source, tmp_path / "two", model=model, part="probes").kind == "probe set"
