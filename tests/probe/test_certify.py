"""Certification: its parts on their own, and the whole command on the demo model, one engine per run."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sedac.errors import ConfigError, PolicyInvalid
from sedac.policy.check import validate
from sedac.policy.digest import get_knobs_digest
from sedac.policy.model import Policy
from sedac.policy.weights import get_weights_digest
from sedac.probe.manifest import LevelRecord, TierRecord, read_manifest
from sedac_probes.certification import certify, losses, policy_file, prompts
from sedac_probes.certification.family import TIER, Member, make_family, make_layout, make_policy, parse_member
from sedac_probes.certification.session import Settings
from sedac_probes.corpus import Document

from testing.forked import run_python

DEMO = Path(__file__).resolve().parents[2] / "probes" / "sedac_demo"
MANIFEST = read_manifest(DEMO / "probe-set")
WEIGHTS = get_weights_digest(str(DEMO / "model"))


def level(name: str, saved: float, ratio: float) -> LevelRecord:
    return LevelRecord(name=name, reduction="contextual", saved=saved, perplexity_ratio=ratio)


def test_family_goes_from_safe_to_fast_along_the_front_and_through_the_sets_tiers():
    levels = (level("c", 0.3, 1.01), level("a", 0.1, 1.001), level("beaten", 0.2, 1.02), level("b", 0.2, 1.002))
    tiers = (
        TierRecord(name="x", floor="b", level="c", threshold_scale=2.0),
        TierRecord(name="y", floor="b", level="c", threshold_scale=0.5),
        TierRecord(name="plain", floor="a", level="a"),
        TierRecord(name="exits", floor="a", level="skip"),
    )
    found = make_family(dataclasses.replace(MANIFEST, levels=levels, tiers=tiers))
    assert [m.label for m in found] == ["a", "b", "b, c x 0.5", "b, c x 2", "c"]


def test_family_without_levels_is_hard_exits_at_growing_thresholds():
    found = make_family(dataclasses.replace(MANIFEST, levels=(), tiers=()))
    assert {(m.floor, m.level) for m in found} == {("full", "skip")}
    assert [m.threshold_scale for m in found] == sorted({m.threshold_scale for m in found})


def test_policy_carries_the_member_as_its_default_tier():
    policy = make_policy(MANIFEST, Member(floor="contextual-20", level="contextual-30", threshold_scale=0.5))
    (tier,) = [t for t in policy.tiers if t.name == TIER]
    assert (tier.floor, tier.level, tier.threshold_scale, policy.default_tier) == ("contextual-20", "contextual-30", 0.5, TIER)
    assert {t.name for t in MANIFEST.tiers} < {t.name for t in policy.tiers}
    with pytest.raises(PolicyInvalid, match="'thin' is not a level of this engine"):
        make_policy(MANIFEST, Member(floor="thin", level="thin"))


def test_members_are_read_from_text():
    assert parse_member("a") == Member(floor="a", level="a")
    assert parse_member("a, b,0.5") == Member(floor="a", level="b", threshold_scale=0.5)
    for bad in ("", "a,", "a,b,c", "a,b,-1", "a,b,1,1", "a,b,nan"):
        with pytest.raises(ConfigError, match="FLOOR"):
            parse_member(bad)


def make_exchange(**changes) -> losses.Exchange:
    return losses.Exchange(**{"prompt": [1], "exact": [1, 2, 3], "bounded": [1, 9], "gaps": [0.0, 0.5]} | changes)


def test_losses_on_answers_worked_out_by_hand():
    def lose(name: str, **changes) -> float:
        return losses.load_loss(name, str).compute_all([make_exchange(**changes)])[0]

    assert lose("mismatch") == 0.5
    assert lose("mismatch", gaps=[0.0, 0.0]) == 0
    assert lose("nll") == 0.25
    assert lose("nll", gaps=[9.0, 0.0]) == 1, "clipped"
    assert lose("divergence") == pytest.approx(2 / 3), "one token differs, one is missing"
    assert lose("divergence", bounded=[1, 2, 3]) == 0


def test_own_loss_gets_texts_and_must_return_a_number_in_the_unit_interval(tmp_path, monkeypatch):
    (tmp_path / "my_loss.py").write_text("def lost(prompt, exact, bounded):\n    return VALUES[(prompt, exact, bounded)]\nVALUES = {}\nlimit = 3\n")
    monkeypatch.chdir(tmp_path)
    loss = losses.load_loss("my_loss:lost", lambda ids: " ".join(map(str, ids)))
    values = sys.modules["my_loss"].VALUES
    for good in (0, 1, 0.25, True):
        values["1", "1 2 3", "1 9"] = good
        assert loss.compute_all([make_exchange()]) == [float(good)]
    for bad in (1.5, -0.1, float("nan"), None, "0.5"):
        values["1", "1 2 3", "1 9"] = bad
        with pytest.raises(ConfigError, match="loss my_loss:lost of request 0 is"):
            loss.compute_all([make_exchange()])
    for name, problem in (("my_loss:nothing", "can't be imported"), ("no_such_module:f", "can't be imported"), ("my_loss:limit", "no function")):
        with pytest.raises(ConfigError, match=problem):
            losses.load_loss(name, str)
    with pytest.raises(ConfigError, match="mismatch, nll, divergence or module:function"):
        losses.load_loss("accuracy", str)
    with pytest.raises(ConfigError, match="greedy choice"):
        losses.load_loss("mismatch", str, temperature=0.7)


def tokenise(text: str) -> dict[str, list[int]]:
    return {"input_ids": [ord(c) for c in text if c != "\n"]}


def test_requests_come_from_different_documents_first_and_from_different_places_then():
    documents = [Document(path=f"{i}", text="".join(f"{i}{n:03}\n" for n in range(200))) for i in range(4)]
    cut = prompts.cut_requests(documents, tokenise, num_requests=10, num_tokens=8, seed=1)
    assert [len({r.document for r in cut[i : i + 4]}) for i in (0, 4)] == [4, 4]
    assert len({(r.document, r.place) for r in cut}) == 10
    for request in cut:
        (document,) = [d for d in documents if d.path == request.document]
        assert request.place == 0 or document.text[request.place - 1] == "\n"
        assert request.prompt == tokenise(document.text[request.place :])["input_ids"][:8]
    again = prompts.cut_requests(documents[::-1], tokenise, num_requests=10, num_tokens=8, seed=1)
    assert again == cut
    assert prompts.get_digest(cut) != prompts.get_digest(prompts.cut_requests(documents, tokenise, num_requests=10, num_tokens=8, seed=2))
    with pytest.raises(ConfigError, match=r"4 documents give \d+ prompts of 8 tokens, 5000 wanted"):
        prompts.cut_requests(documents, tokenise, num_requests=5000, num_tokens=8, seed=1)
    with pytest.raises(ConfigError, match="1 documents give 0 prompts"):
        prompts.cut_requests([Document(path="short", text="a")], tokenise, num_requests=1, num_tokens=8, seed=1)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"eps": 0.0}, "--eps is 0.0"),
        ({"delta": 1.0}, "--delta is 1.0"),
        ({"num_requests": 0}, "--requests is 0"),
        ({"temperature": -1.0}, "--temperature is -1.0"),
        ({"answer_tokens": 480}, "exceed the model's 512 tokens"),
    ],
)
def test_settings_out_of_range_are_refused(change, problem):
    with pytest.raises(ConfigError, match=problem):
        Settings(**change).check(str(DEMO / "model"))


def run(out: Path, *options: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    small = ("--requests", "32", "--tokens", "8", "--prompt-tokens", "32")
    command = ["-m", "sedac_probes.cli", "certify", "--out", str(out), *small, *options]
    return run_python(*command, timeout=600, cwd=cwd, env=os.environ | {"COLUMNS": "160"})


@pytest.fixture(scope="module")
def certified(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A certification on few requests at a loose bound."""
    out = tmp_path_factory.mktemp("certified")
    done = run(out, "--eps", "0.4", "--member", "contextual-20", "--member", "contextual-30,contextual-40", "--member", "width-50,skip,1000")
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done


@pytest.mark.engine
def test_certified_policy_carries_a_certificate_that_fits_the_demo(certified):
    out, done = certified
    policy = policy_file.read(out / "policy.json")
    certificate = policy.certificate
    assert certificate is not None
    validate(policy, make_layout(MANIFEST, WEIGHTS))
    assert certificate.knobs_sha256 == get_knobs_digest(policy, TIER)
    assert (certificate.weights_sha256, certificate.probe_set_sha256) == (WEIGHTS, MANIFEST.sha256)
    result = json.loads((out / "certificate.json").read_text())
    members = {m["label"]: m for m in result["members"]}
    passed, failed = members["contextual-30, contextual-40"], members["width-50, skip x 1000"]
    assert [m["verdict"] for m in result["members"]] == ["passed", "certified", "failed"], "all MLPs above the first checkpoint are skipped"
    assert result["certified"] == "contextual-30, contextual-40"
    assert certificate.mean_loss == passed["mean_loss"] < passed["upper_limit"] <= 0.4
    assert members["contextual-20"]["saved"] == pytest.approx(0.2, abs=0.03)
    assert 0.28 < passed["saved"] < 0.45 < 0.7 < failed["saved"]
    assert failed["mean_loss"] > 0.4
    assert failed["num_needed"] is None
    assert result["exact_loss"] < members["contextual-20"]["mean_loss"] + 0.01
    assert "certified: contextual-30, contextual-40 has a mean mismatch of at most 0.4 at 95 %" in done.stdout
    assert (out / "certificate.png").stat().st_size > 5000


@pytest.mark.engine
def test_too_strict_says_none_and_how_much_data_and_a_stopped_run_goes_on(certified, tmp_path):
    out = Path(shutil.copytree(certified[0], tmp_path / "again"))
    before = json.loads((out / "certificate.json").read_text())["members"]
    (kept,) = (out / "certify").iterdir()
    first = kept / (get_knobs_digest(make_policy(MANIFEST, Member(floor="contextual-20", level="contextual-20")), TIER)[:16] + ".json")
    answers, exact = first.read_bytes(), (kept / "exact.json").stat().st_mtime_ns
    first.rename(first.with_suffix(".tmp"))  # as if killed while it was written
    done = run(out, "--eps", "0.05", "--delta", "0.00001", "--member", "contextual-20", "--member", "contextual-30,contextual-40")
    assert done.returncode == 1, done.stdout + done.stderr
    result = json.loads((out / "certificate.json").read_text())
    assert first.read_bytes() == answers
    assert (kept / "exact.json").stat().st_mtime_ns == exact, "finished answers are not made again"
    assert {k: result["members"][0][k] for k in ("mean_loss", "saved")} == {k: before[0][k] for k in ("mean_loss", "saved")}
    assert [m["verdict"] for m in result["members"]] == ["failed", "untested"]
    assert (result["certified"], result["certificate"]) == (None, None)
    assert not (out / "policy.json").exists()
    needed = result["members"][0]["num_needed"]
    assert needed > 32
    assert "none is certified: contextual-20, the safest, was not shown to have a mean mismatch of at most 0.05 at 99.999 %" in done.stderr
    assert f"--requests {needed}" in done.stderr


@pytest.mark.engine
def test_check_measures_fresh_requests_and_refuses_what_the_certificate_is_not_for(certified, tmp_path):
    out, _ = certified
    done = run(tmp_path, "--check", str(out / "policy.json"), "--requests", "64", "--tokens", "16")  # enough that some token differs on any CPU
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads((tmp_path / "check.json").read_text())
    policy = policy_file.read(out / "policy.json")
    assert policy.certificate is not None
    assert seen["data_sha256"] != policy.certificate.data_sha256
    assert 0 < seen["mean_loss"] <= 0.4
    assert f"observed mean {seen['mean_loss']:.4f}, certified bound 0.4: holds" in done.stdout

    def check(changed: Policy) -> None:
        certify.check(str(DEMO / "model"), DEMO / "probe-set", changed, [], Settings(), tmp_path)

    for changed, problem in (
        (dataclasses.replace(policy, checkpoints=policy.checkpoints[1:]), "knobs were changed"),
        (dataclasses.replace(policy, certificate=dataclasses.replace(policy.certificate, weights_sha256="0" * 64)), "certificate.weights_sha256"),
    ):
        with pytest.raises(PolicyInvalid, match=problem):
            check(changed)
    with pytest.raises(ConfigError, match="no certificate"):
        check(dataclasses.replace(policy, certificate=None))


@pytest.mark.thorough
@pytest.mark.engine
def test_at_a_temperature_both_answers_draw_alike_and_an_own_loss_judges_the_texts(tmp_path):
    (tmp_path / "scores.py").write_text(
        "def differs(prompt, exact, bounded):\n    assert prompt and exact and bounded\n    return exact != bounded\n"
    )
    options = ("--loss", "scores:differs", "--temperature", "0.8", "--eps", "0.5", "--procedure", "hb")
    done = run(tmp_path, *options, "--member", "full", "--member", "width-50,skip,1000", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "certificate.json").read_text())
    full, most = result["members"]
    assert (full["verdict"], full["mean_loss"], full["saved"]) == ("certified", 0.0, 0.0), "a tier that reduces nothing draws the exact answers"
    assert (most["verdict"], result["exact_loss"]) == ("failed", 0.0)
    assert result["certificate"]["loss"] == "scores:differs"
    assert result["certificate"]["procedure"] == "hb"
