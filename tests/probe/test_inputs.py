"""Whatever is wrong with texts, layers or shards ends in one clear line and exit code 1, before an engine starts and with nothing written."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from sedac_probes.cli import main
from sedac_probes.collecting.texts import read_texts

DEMO = Path(__file__).resolve().parents[2] / "probes" / "sedac_demo" / "model"
GOOD = "def read(self):\n    return self.file.read()\n" * 3
HIDDEN = 16


def refuse(capsys, monkeypatch, tmp_path, *arguments):
    """Run the command, expect exit code 1, one line and nothing new on the disk; return the line."""
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr("sys.argv", ["sedac-probes", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    errors = capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert "Traceback" not in errors
    (said,) = [line for line in errors.splitlines() if line.startswith("sedac-probes: ")]
    assert errors.endswith(f"{said}\n"), errors  # a note may come before it
    return said


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
    return lambda *arguments: refuse(capsys, monkeypatch, tmp_path, *arguments)


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


TEXTS = {
    "empty file": ("a.txt", "", r"a.txt is empty; name a file with text"),
    "only blanks": ("a.jsonl", "\n \n", r"a.jsonl is empty"),
    "one token": ("a.txt", "def", r"none of the 1 documents .* has 40 characters \(longest: 3\)"),
    "not UTF-8": ("a.txt", GOOD.encode() + b"\xff\xfe", r"a.txt is not UTF-8 \(byte 132: invalid start byte\); convert it"),
    "malformed line": ("a.jsonl", json.dumps({"text": GOOD}) + "\n{'text': 1}\n", r"a.jsonl, line 2 is not JSON"),
    "no object": ("a.jsonl", '["text"]\n', r"a.jsonl, line 1 is no object but list"),
    "other fields": ("a.jsonl", '\n{"body": "x"}\n', r"a.jsonl, line 2 has the fields \['body'\], none is a text"),
    "text that is none": ("a.jsonl", '{"text": 5}\n', r"a.jsonl, line 1 has the fields \['text'\]"),
    "chat without roles": ("a.jsonl", '{"messages": [{"content": "x"}]}\n', r"a.jsonl, line 1: a chat is a list of objects with a role"),
    "pickle as text": ("a.txt", pickle.dumps({"a": torch.zeros(3)}), r"a.txt is not UTF-8"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_broken_texts(refused, tmp_path, case):
    name, text, match = TEXTS[case]
    path = write(tmp_path / name, text)
    line = refused("collect", "--out", tmp_path / "out", "--texts", path)
    assert re.search(match, line), line


def test_missing_texts(refused, tmp_path):
    (tmp_path / "none").mkdir()
    assert "no .txt or .jsonl files; name a directory of those" in refused("collect", "--out", tmp_path / "out", "--texts", tmp_path / "none")
    assert "can't be read (No such file or directory)" in refused("collect", "--out", tmp_path / "out", "--texts", tmp_path / "gone.txt")


def test_dataset_without_the_package_says_what_to_do(refused, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)  # as where it is not installed
    line = refused("collect", "--out", tmp_path / "out", "--dataset", "some/name", "--split", "test")
    assert "--dataset some/name needs the package datasets (pip install datasets); or name local files with --texts" in line
    assert "--split and --field belong to --dataset" in refused("collect", "--out", tmp_path / "out", "--split", "test")


OPTIONS = {
    "negative layer": (("--layers", "-1,3"), "--layers names [-1], outside 0..10 (the model has 12 layers"),
    "last layer": (("--layers", "3,11"), "--layers names [11], outside 0..10"),
    "beyond the depth": (("--layers", "3,40"), "--layers names [40], outside 0..10"),
    "twice": (("--layers", "3,5,3"), "--layers names [3] more than once"),
    "no number": (("--layers", "3,x"), "--layers has 'x'; give layer numbers"),
    "layers and suggest": (("--layers", "3", "--suggest"), "--layers [3] and --suggest are two ways"),
    "no samples": (("--samples", "0"), "--samples is 0; give at least 1"),
    "too long": (("--max-length", "4096"), "--max-length is 4096; give 3 to 512"),
    "no top": (("--top-k", "0"), "--top-k is 0; give 1 to 1024"),
    "dtype": (("--dtype", "int4"), "--dtype is 'int4'; give one of auto, float32"),
    "model": (("--model", "nowhere"), "--model nowhere is no model directory"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_wrong_options(refused, tmp_path, case):
    options, match = OPTIONS[case]
    assert match in refused("collect", "--out", tmp_path / "out", "--texts", write(tmp_path / "a.txt", GOOD), *options)


def test_every_kind_of_text_is_read(tmp_path):
    chat = [{"role": "user", "content": "Write a reader of files that skips comments."}, {"role": "assistant", "content": "def read(self): pass"}]
    rows = [
        {"text": GOOD},
        {"messages": chat},
        {"prompt": GOOD, "completion": "done"},
        {"prompt": chat[:1], "completion": chat[1:]},
        {"text": "short"},
    ]
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep" / "b.jsonl", "\n".join(map(json.dumps, rows)))
    write(tmp_path / "a.txt", GOOD)
    write(tmp_path / "c.bin", b"\xff")
    found = read_texts([str(tmp_path)], str(DEMO))
    rendered = "# Write a reader of files that skips comments.\ndef read(self): pass\n\n"
    assert [d.text for d in found] == [GOOD, GOOD, rendered, GOOD + "done", rendered]
    assert [d.path for d in found] == [str(tmp_path / "a.txt"), *(f"{tmp_path}/deep/b.jsonl:{i}" for i in (1, 2, 3, 4))]


@pytest.fixture
def collection(tmp_path):
    """Two shards of random streams, as `collect` lays them out."""
    directory = tmp_path / "streams"
    directory.mkdir()
    described = {"model": "m", "layers": [1], "num_documents": 40, "max_length": 16, "hidden_size": HIDDEN, "num_layers": 4, "data_digest": ""}
    (directory / "collection.json").write_text(json.dumps(described | {"num_shards": 2}))
    for number in range(2):
        save_shard(directory, number)
    return directory


def save_shard(directory, number, hidden=HIDDEN, **changed):
    row = torch.arange(20 * 15)
    tensors = {"document": row // 15 + 20 * number, "position": row % 15, "entropy": torch.rand(len(row)), "stream.1": torch.randn(len(row), hidden)}
    safetensors.torch.save_file(tensors | changed, directory / f"shard-{number:05d}.safetensors")


def train(refused, directory):
    return refused("train", "--collection", directory, "--out", directory.parent / "set", "--name", "x", "--epochs", "1", "--rank", "4")


class Trap:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_good_shards_train(collection, monkeypatch, capsys):
    arguments = ["sedac-probes", "train", "--collection", str(collection), "--out", str(collection.parent / "set"), "--name", "x", "--epochs", "1"]
    monkeypatch.setattr("sys.argv", [*arguments, "--rank", "4"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    assert (collection.parent / "set" / "manifest.json").is_file()


def test_shard_cut_short(refused, collection):
    path = collection / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path} can't be read as safetensors" in (line := train(refused, collection))
    assert "cut short or no shard; remove it and run" in line


def test_shard_missing(refused, collection):
    (collection / "shard-00000.safetensors").unlink()
    assert "has 1 of 2 shards; run `sedac-probes collect` again with the same settings, it resumes" in train(refused, collection)
    (collection / "shard-00001.safetensors").unlink()
    assert f"no shards in {collection}; run `sedac-probes collect` first" in train(refused, collection)


@pytest.mark.parametrize("name", ["stream.1", "entropy"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_a_shard(refused, collection, name, value):
    tensor = torch.rand(300, HIDDEN) if name == "stream.1" else torch.rand(300)
    tensor[7] = value
    save_shard(collection, 1, **{name: tensor})
    assert f"shard-00001.safetensors: {name} holds {HIDDEN if name == 'stream.1' else 1} NaN or infinite values; check" in train(refused, collection)


def test_shards_of_another_hidden_size(refused, collection):
    save_shard(collection, 1, hidden=24)
    assert "shard-00001.safetensors has hidden size 24, the shards before it 16; a collection is of one model" in train(refused, collection)
    save_shard(collection, 0, hidden=24)
    assert "is described as of hidden size 16, its shards have 24; collect again from one model" in train(refused, collection)


def test_layer_that_was_not_recorded(refused, collection):
    path = collection / "collection.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layers": [2]}))
    assert "has no stream of layer 2; collect again with --layers naming it" in train(refused, collection)


def test_collection_of_another_model_is_not_continued(refused, collection):
    text = write(collection.parent / "a.txt", GOOD)
    line = refused("collect", "--out", collection, "--texts", text)
    assert "holds a collection made with other settings (model 'm', asked for" in line
    assert "hidden_size 16, asked for 256" in line


def test_collection_of_other_weights(refused, collection):
    path = collection / "collection.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": str(DEMO), "weights_sha256": "a" * 64}))
    assert "was recorded from weights aaaaaaaaaaaa" in train(refused, collection)


def test_code_in_a_pickle_offered_as_a_shard_is_never_run(refused, collection, tmp_path):
    trap, path = tmp_path / "trap", collection / "shard-00001.safetensors"
    torch.save({"stream.1": torch.zeros(2, 2), "code": Trap(trap)}, path)
    assert f"{path} can't be read as safetensors" in train(refused, collection)
    assert not trap.exists()
    torch.load(io.BytesIO(path.read_bytes()), weights_only=False)  # it goes off where it is let out
    assert trap.exists()


def test_code_in_a_pickle_offered_as_a_probe_is_never_run(refused, tmp_path):
    from sedac.errors import ArtifactError
    from sedac.probe import artifact
    from sedac.probe.manifest import Manifest, ProbeRecord
    from sedac.probe.probe import LREProbe

    manifest = Manifest(name="x", model="m", hidden_size=8, num_layers=4, rank=4, target="none", probes=(ProbeRecord(layer=1, threshold=0.1),))
    artifact.save(tmp_path / "set", manifest, {1: LREProbe(8, 4)})
    trap = tmp_path / "trap"
    planted, described = tmp_path / "set" / artifact.WEIGHTS, tmp_path / "set" / "manifest.json"
    torch.save({"1.down.weight": torch.zeros(2, 2), "code": Trap(trap)}, planted)
    with pytest.raises(ArtifactError, match="has sha256"):
        artifact.load(tmp_path / "set")
    digest = hashlib.sha256(planted.read_bytes()).hexdigest()
    described.write_text(json.dumps(json.loads(described.read_text()) | {"sha256": digest}))
    with pytest.raises(ArtifactError, match="safetensors"):
        artifact.load(tmp_path / "set")
    assert not trap.exists()


def test_default_layers_are_the_earlier_versions():
    from sedac_probes.collecting.collect import choose_layers

    assert (choose_layers(36), choose_layers(28)) == ((7, 14, 21), (5, 12, 19))
    assert choose_layers(12) == (2, 5, 8)
    assert all(layers and max(layers) < depth - 1 for depth in range(2, 100) if (layers := choose_layers(depth)))
