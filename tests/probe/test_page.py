"""The report page: one file with everything in it, all text escaped, whatever the work directory has or lacks."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import re
import xml.etree.ElementTree
from pathlib import Path

import pytest
import safetensors.torch
import torch
import typer
from sedac.errors import ConfigError
from sedac.probe import artifact
from sedac.probe.levels import Level, Neurons
from sedac.probe.manifest import LevelRecord, Manifest, ProbeRecord, TierRecord
from sedac.probe.probe import LREProbe
from sedac_probes.cli import app
from sedac_probes.page.page import make_page
from typer.testing import CliRunner

HOSTILE = "<script>alert(1)</script>\"'&`x`"
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
VOID = {"meta", "img", "br", "hr", "input", "link"}


class Reader(html.parser.HTMLParser):
    """What a browser would see: tags, attributes, text; refuses tags that are not closed in order."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.words, self.open = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def read(page):
    """Parse a page and hold what every page must: no scripts, nothing from outside, charts that are well-formed."""
    reader = Reader(page)
    assert not {"script", "iframe", "object", "link", "form", "base"} & set(reader.tags)
    for name, value in reader.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "href") or value.startswith(("data:image/png;base64,", "#")), (name, value)
    assert "url(" not in page
    assert "@import" not in page
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        xml.etree.ElementTree.fromstring(svg)
        assert "nan" not in re.sub(r"<title>.*?</title>", "", svg).lower()
    return reader


def write(path, **data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def make_quality(at, saved, ratio):
    return {"at": at, "saved": saved, "perplexity_ratio": ratio, "agreement": 0.9, "kl": 0.01, "num_tokens": 1000}


def write_certificate(work, probe_set, *, passed=True):
    settings = {"loss": "mismatch", "eps": 0.05, "delta": 0.1, "procedure": "wsr", "num_requests": 1234}
    member = {"label": "contextual-30", "floor": "contextual-30", "level": "contextual-30", "saved": 0.301, "mean_loss": 0.012, "upper_limit": 0.031}
    failed = member | {"label": "contextual-50", "saved": 0.5, "mean_loss": 0.06, "upper_limit": 0.08, "p_value": 0.7, "num_needed": 4321}
    certificate = {"tier": "certified", "weights_sha256": "a" * 64, "probe_set_sha256": probe_set, "knobs_sha256": "b" * 64, "upper_limit": 0.031}
    write(
        work / "certificate.json", kind="certify", summary="certified: so and so" if passed else "none is certified: 4,321 requests would do",
        certified="contextual-30" if passed else None, settings=settings, num_documents=77, data_sha256="c" * 64, exact_loss=0.002,
        members=[*([member | {"p_value": 0.001, "verdict": "certified"}] if passed else []), failed | {"verdict": "failed"},
                 {"label": "width-40", "verdict": "not tested"}],
        certificate=certificate if passed else None,
    )  # fmt: skip


@pytest.fixture
def probe_set(tmp_path):
    probes = {layer: LREProbe(32, 8) for layer in (1, 3)}
    records = tuple(ProbeRecord(layer=n, threshold=0.5, metrics={"spearman": 0.731, "huber": 0.05, "risk_q0.1": 0.25, "novel": 7.5}) for n in probes)
    levels = (Level(name="contextual-30", reduction="contextual", parameters_L=torch.rand(4)),)
    neurons = {n: Neurons(order_F=torch.arange(16, dtype=torch.int32), scale_F=torch.ones(16), repair_FD=None) for n in range(4)}
    manifest = Manifest(
        name="tested", model="tiny", hidden_size=32, num_layers=4, rank=8, target="log1p(final entropy)", probes=records, intermediate_size=16,
        activation="silu", levels=(LevelRecord(name="contextual-30", reduction="contextual", saved=0.301, perplexity_ratio=1.0042),),
        tiers=(TierRecord(name="balanced", floor="contextual-30", level="skip"),),
    )  # fmt: skip
    return tmp_path / "set", artifact.save(tmp_path / "set", manifest, probes, levels=levels, neurons=neurons).sha256


@pytest.fixture
def work(tmp_path, probe_set):
    """A work directory with everything in it."""
    work, sha256 = tmp_path / "run", probe_set[1]
    write(work / "streams" / "collection.json", model="/models/tiny", layers=[1, 3], num_documents=5, max_length=64, hidden_size=32, num_layers=4,
          data_digest="d" * 64)  # fmt: skip
    for number, count in enumerate((30, 12)):
        safetensors.torch.save_file({"entropy": torch.rand(count)}, work / "streams" / f"shard-{number:05d}.safetensors")
    curve = [{"predicted": 0.1, "observed": 0.12}, {"predicted": 0.5, "observed": 0.4}]
    trained = {"layer": 1, "num_heldout_tokens": 4242, "spearman": 0.66, "huber": 0.01, "overconfident": {"share": 0.37, "size": 0.123}}
    trained |= {"calibration": curve, "losses": [0.3, 0.2, 0.25], "later": "version"}
    write(work / "train.json", kind="train", probes=[trained], surprise={"deep": [1, 2]})
    write(work / "validation.json", kind="validate", rows=[{"quantile": 0.05, "perplexity_ratio": 1.1234}])
    write(work / "calibration.json", kind="calibrate", probe_set=sha256, plans={"contextual-30": [0, 0.2, 0.4, 0.6]},
          mechanisms={"contextual": [make_quality("contextual-30", 0.301, 1.0042)], "tier balanced": [make_quality("...", 0.33, 1.0099)]},
          training={"num_documents": 9, "data_digest": "e" * 64})  # fmt: skip
    write(work / "comparison.json", probe_set=sha256, data={"num_documents": 3, "num_tokens": 999, "data_digest": "f" * 64},
          mechanisms={"hard exit": [make_quality("2%", 0.04, 1.05), make_quality("5%", 0.08, 1.13)], "contextual": [make_quality("30", 0.3, 1.004)]},
          equal_savings={"saved": [0.1, 0.2], "perplexity_ratio": {"hard exit": [1.17, None], "contextual": [1.0011, 1.0022]}})  # fmt: skip
    write_certificate(work, sha256)
    write(work / "policy.json", enabled=True)
    (work / "validation.png").write_bytes(PNG)
    return work


def test_a_whole_run_is_told_on_one_page(work, probe_set):
    page = make_page(work, probe_set[0])
    seen = read(page)
    assert "Of requests like the 1,234 tested, the expected mismatch is at most 0.05, with confidence 90 %." in seen.text
    for expected in (
        "CERTIFIED",
        "30.1%",
        "0.731",
        "novel",
        "7.5",
        "1.0042",
        "1.0099",
        "1.1234",
        "deep",
        "1.0022",
        "not tested",
        "4,321",
        "4,242",
        "37% by 0.123",
        "version",
    ):
        assert expected in seen.text, expected
    for digest in ("a" * 64, "b" * 64, "c" * 64, "d" * 64, "e" * 64, "f" * 64, probe_set[1]):
        assert digest in seen.text
    assert re.search(r"collect 5 42 d{64}", re.sub(r"\s+", " ", seen.text))  # documents, and the tokens of both shards
    assert f"sedac ctl policy apply {work / 'policy.json'} --wait 5" in seen.text
    assert f"sedac serve /models/tiny --probe-set {probe_set[0]}" in seen.text
    assert "Missing" not in seen.text
    assert "Look at this first" not in seen.text
    assert base64.b64encode(PNG).decode() in page
    assert len(re.findall(r"<svg viewBox=\"0 0", page)) == 5  # certificate, two of training, calibration, comparison
    assert re.findall(r'title="layer (\d): ([\d.]+) %"', page) == [("0", "0.0"), ("1", "20.0"), ("2", "40.0"), ("3", "60.0")]


def test_the_front_holds_what_nothing_beats(work, probe_set):
    write(
        work / "comparison.json",
        mechanisms={"a": [make_quality("x", 0.1, 1.01), make_quality("beaten", 0.1, 1.02)], "b": [make_quality("y", 0.2, 1.05)]},
    )
    rows = re.search(r"Points of the front: 2</summary>.*?<tbody>(.*?)</tbody>", make_page(work, probe_set[0]), re.DOTALL).group(1)
    assert re.findall(r"<td>(\w+)</td><td>(\w+)</td>", rows) == [("a", "x"), ("b", "y")]


def test_nothing_that_was_not_certified_reads_as_certified(work, probe_set):
    write_certificate(work, probe_set[1], passed=False)
    (work / "policy.json").unlink()
    seen = read(make_page(work, probe_set[0]))
    assert "NONE CERTIFIED" in seen.text
    assert "It was not shown of any policy that of requests like the 1,234 tested" in seen.text
    assert "None is certified: 4,321 requests would do." in seen.text
    assert "policy apply" not in seen.text
    (work / "certificate.json").unlink()
    seen = read(make_page(work, probe_set[0]))
    assert "UNCERTIFIED No certification was run" in seen.text
    assert f"Missing: certificate sedac-probes certify --model /models/tiny --probe-set {probe_set[0]}" in seen.text


@pytest.mark.parametrize("name", ["train", "validation", "calibration", "comparison", "certificate", "streams/collection"])
def test_a_missing_or_broken_part_is_left_out_with_its_command(work, probe_set, name):
    path = work / f"{name}.json"
    path.unlink()
    seen = read(make_page(work, probe_set[0]))
    commands = {
        "train": "train",
        "validation": "validate",
        "calibration": "calibrate",
        "comparison": "compare",
        "certificate": "certify",
        "streams/collection": "collect",
    }
    assert f"sedac-probes {commands[name]} " in seen.text.replace("sedac-probes certify --check", "")
    for broken in (b"{", b"1", b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(broken)
        assert f"{path.name} can't be read" in read(make_page(work, probe_set[0])).text


def test_the_commands_on_the_page_have_these_options(tmp_path, probe_set):
    """Of a directory that lacks everything but the probe set."""
    (tmp_path / "new").mkdir()
    known = typer.main.get_command(app).commands
    lines = re.findall(r"sedac-probes (\w+) ([^<]*)</code>", make_page(tmp_path / "new", probe_set[0]))
    assert [name for name, _ in lines] == ["collect", "train", "validate", "calibrate", "compare", "certify"]
    for name, options in lines:
        accepted = {option for parameter in known[name].params for option in parameter.opts}
        assert set(re.findall(r"--[\w-]+", options)) <= accepted, name


def test_every_text_is_escaped(work, probe_set):
    """A hostile string in place of every string and key of every file, one file at a time."""

    def poison(value, *, keys):
        if isinstance(value, dict):
            return {(f"{k}{HOSTILE}" if keys else k): poison(v, keys=keys) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(v, keys=keys) for v in value]
        return HOSTILE if isinstance(value, str) else value

    for path in [*work.glob("*.json"), work / "streams" / "collection.json"]:
        data = json.loads(path.read_text())
        for poisoned in (poison(data, keys=False), poison(data, keys=True), data | {"documents": [{"path": HOSTILE}], HOSTILE: HOSTILE}):
            path.write_text(json.dumps(poisoned))
            page = make_page(work, probe_set[0])
            assert "<script" not in page
            read(page)
        assert "<script>alert(1)</script>" in read(page).text or path.name == "policy.json"
        path.write_text(json.dumps(data))


WRONG = [None, "text", -1, 0, 1e308, 10**400, float("nan"), True, [], [[]], {}, {"a": {"b": {"c": {"d": {"e": 1}}}}}, [1, "x", None], [{"layer": {}}]]


def test_values_of_any_form_are_shown_or_left_out(work, probe_set):
    """Every field of every file becomes everything in turn: an older or newer version's file never stops the page."""

    def vary(value):
        yield from WRONG
        if isinstance(value, dict):
            for key in value:
                for other in vary(value[key]):
                    yield value | {key: other}
                yield {k: v for k, v in value.items() if k != key}
        if isinstance(value, list) and value:
            for other in vary(value[0]):
                yield [other, *value[1:]]

    tried = 0
    for path in [*work.glob("*.json"), work / "streams" / "collection.json"]:
        data = json.loads(path.read_text())
        for changed in vary(data):
            if isinstance(changed, dict):
                path.write_text(json.dumps(changed))
                make_page(work, probe_set[0])
                tried += 1
        path.write_text(json.dumps(data))
    assert tried > 500


def test_a_mixture_of_runs_is_said(work, probe_set):
    data = json.loads((work / "comparison.json").read_text())
    write(work / "comparison.json", **data | {"probe_set": hashlib.sha256(b"other").hexdigest()})
    text = read(make_page(work, probe_set[0])).text
    assert f"comparison.json was made with probe set {hashlib.sha256(b'other').hexdigest()[:12]}" in text


def test_the_command_writes_the_page_and_refuses_nothing_to_report(work, probe_set, tmp_path):
    result = CliRunner().invoke(app, ["report", str(work), "--probe-set", str(probe_set[0])])
    assert result.exit_code == 0, result.output
    assert f"{work / 'report.html'}: " in result.output
    read((work / "report.html").read_text())
    assert list(work.glob(".*")) == []
    (tmp_path / "empty").mkdir()
    for directory, match in ((tmp_path / "empty", "has none of train.json.*sedac-probes demo"), (Path("/nowhere"), "/nowhere is no directory")):
        with pytest.raises(ConfigError, match=match):
            make_page(directory, directory)
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["report", str(work), "--out", str(tmp_path / "file" / "report.html")])
    assert isinstance(result.exception, ConfigError)
    assert "can't be written" in str(result.exception)


def test_steps_on_the_same_texts_are_named(work, probe_set):
    assert "took the very same texts" not in read(make_page(work, probe_set[0])).text
    data = json.loads((work / "comparison.json").read_text())
    write(work / "comparison.json", **data | {"data": {"num_documents": 9, "data_digest": "e" * 64}})
    assert "calibrate and compare took the very same texts." in read(make_page(work, probe_set[0])).text


def test_a_part_is_known_by_its_kind(work, probe_set):
    (work / "comparison.json").rename(work / "quality.json")
    data = json.loads((work / "quality.json").read_text())
    assert "Missing: comparison" in read(make_page(work, probe_set[0])).text
    write(work / "quality.json", **data | {"kind": "compare"})
    assert "Missing: comparison" not in read(make_page(work, probe_set[0])).text
