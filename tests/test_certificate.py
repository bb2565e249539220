"""Certificates fit exactly the knobs, weights and probes that they name; the weights' digest names the weights and nothing else."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path

import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st
from sedac.contract import wire
from sedac.contract.v1 import control_pb2
from sedac.errors import ConfigError, PolicyInvalid
from sedac.policy.check import validate
from sedac.policy.digest import get_knobs_digest
from sedac.policy.knob import list_fields, list_knobs
from sedac.policy.layout import Layout
from sedac.policy.model import Adaptation, Audit, Checkpoint, Policy, Speculation, Tier
from sedac.policy.weights import get_weights_digest

from testing.strategies import certify, valid_policies

ROOT = Path(__file__).resolve().parents[1]
POLICY = Policy(
    enabled=True,
    checkpoints=(Checkpoint(layer=2, threshold=0.4), Checkpoint(layer=5, threshold=0.6)),
    tiers=(Tier(name="balanced", floor="width-25"), Tier(name="other")),
)
LAYOUT = Layout(
    num_layers=12,
    hidden_size=8,
    checkpoint_layers=(2, 5, 8),
    probe_set="demo",
    levels=("full", "skip", "width-25"),
    weights_sha256="1" * 64,
    probe_set_sha256="2" * 64,
)
_OTHER_VALUES = {"enabled": True, "frozen": True, "target_exit_rates": (0.5, 0.5), "soft_exit": True, "floor": "full", "level": "full"}


def _change(part: object, name: str) -> object:
    """Return the dataclass with another value in one field."""
    value = getattr(part, name)
    return dataclasses.replace(part, **{name: _OTHER_VALUES[name] if name in _OTHER_VALUES else value + 1})


def _list_changes():
    """Yield the policy with one knob changed, for each knob of the checkpoints, adaptation and the tier, and each other that decides."""
    for name in Checkpoint.__dataclass_fields__:
        yield f"checkpoint {name}", dataclasses.replace(POLICY, checkpoints=(POLICY.checkpoints[0], _change(POLICY.checkpoints[1], name)))
    for name in Adaptation.__dataclass_fields__:
        yield f"adaptation {name}", dataclasses.replace(POLICY, adaptation=_change(POLICY.adaptation, name))
    for name in sorted(set(Tier.__dataclass_fields__) - {"name"}):
        yield f"tier {name}", dataclasses.replace(POLICY, tiers=(_change(POLICY.tiers[0], name), POLICY.tiers[1]))
    for field in list_fields(Policy):
        if field.knob.decides and not field.is_part:
            other = next((word for word in field.words if word != field.default), None)
            yield field.name, dataclasses.replace(POLICY, **{field.name: other}) if other else _change(POLICY, field.name)
    yield "checkpoint left out", dataclasses.replace(POLICY, checkpoints=POLICY.checkpoints[:1])


@pytest.mark.parametrize(("name", "changed"), list(_list_changes()))
def test_every_knob_that_decides_changes_the_digest(name, changed):
    assert get_knobs_digest(changed, "balanced") != get_knobs_digest(POLICY, "balanced"), name
    with pytest.raises(PolicyInvalid, match=r"certificate.knobs_sha256: .* knobs were changed; certify again"):
        validate(dataclasses.replace(changed, certificate=certify(POLICY).certificate))


@pytest.mark.parametrize(
    "change",
    [
        {"enabled": False},
        {"default_tier": "exact"},
        {"allow_overrides": True},
        {"probe_set": "demo"},
        {"tiers": (POLICY.tiers[0],)},
        {"tiers": (Tier(name="other", level="full"), POLICY.tiers[0])},
        {"certificate": certify(POLICY).certificate},
        {"audit": Audit(share=0.5, max_mismatch=0.1)},
        {"speculation": Speculation(enabled=False, max_tokens=3, min_confidence=0.9, adaptive=False, tiers=("exact",))},
    ],
)
def test_nothing_else_changes_it(change):
    assert get_knobs_digest(dataclasses.replace(POLICY, **change), "balanced") == get_knobs_digest(POLICY, "balanced")


def test_every_field_of_the_policy_is_in_one_of_the_two_tests():
    decides = {field.name for field in list_fields(Policy) if field.knob.decides}
    assert {"checkpoints", "phase", "scope", "rule", "decay", "sensitivity", "tiers", "adaptation"} <= decides
    tried = {name for name, changed in _list_changes() if name in decides} | {"checkpoints", "tiers", "adaptation"}
    assert tried == decides


def test_what_does_not_decide_is_written_down_here_too():
    """So that nobody takes a knob out of what certificates speak of by one word in its field."""
    others = {"enabled", "default_tier", "allow_overrides", "probe_set", "certificate", "audit", "speculation"}
    assert {field.name for field in list_fields(Policy) if not field.knob.decides} == others
    parts = (Checkpoint, Adaptation, Tier)
    assert [field.name for kind in parts for field in list_fields(kind) if not field.knob.decides] == []


_STORED = Policy(
    enabled=True,
    probe_set="demo",
    checkpoints=(Checkpoint(layer=2, threshold=0.4), Checkpoint(layer=5, threshold=0.6, weight=0.25, target=0.75)),
    phase="all",
    scope="batch",
    rule="accumulate",
    decay=0.8,
    sensitivity=1.5,
    tiers=(Tier(name="balanced", floor="width-25", level="full", threshold_scale=2.0, soft_exit=True), Tier(name="night")),
    default_tier="night",
    allow_overrides=True,
    adaptation=Adaptation(
        frozen=True, target_exit_rates=(0.25, 0.5), alpha=0.5, warmup_steps=7, window_tokens=128, min_threshold=0.125, max_threshold=9.0, generation=3
    ),
    audit=Audit(share=0.5, max_mismatch=0.05, confidence=0.95, action="exact"),
    speculation=Speculation(enabled=False, max_tokens=3, min_confidence=0.5, adaptive=False, tiers=("exact", "night")),
)


@pytest.mark.parametrize(
    ("policy", "tier", "digest"),
    [
        (Policy(), "balanced", "c907eddef8891eb95e0bdfcb3a03f2c7d4d8d03564e8a2ae2c706b607c2af580"),
        (_STORED, "balanced", "78a0eacede11c9a13677690499dd36ec0cd4d8ca70372b3d249135e4d4b622c4"),
        (_STORED, "night", "7a3641bb11bd94c760f6b7a9e3826c819a47d3a45b3972a80ffea21456cd9cbe"),
    ],
)
def test_digests_of_version_0_1_hold(policy, tier, digest):
    assert get_knobs_digest(policy, tier) == digest


_WRITTEN = """{"adaptation": {"alpha": 0.5, "enabled": false, "frozen": true, "generation": 3, "max_threshold": 9.0, "min_threshold": 0.125, \
"target_exit_rates": [0.25, 0.5], "warmup_steps": 7, "window_tokens": 128}, "allow_overrides": true, "audit": {"action": "exact", \
"confidence": 0.95, "max_mismatch": 0.05, "max_nll_difference": null, "share": 0.5}, "certificate": null, "checkpoints": [{"layer": 2, \
"target": 0.5, "threshold": 0.4, "weight": 1.0}, {"layer": 5, "target": 0.75, "threshold": 0.6, "weight": 0.25}], "decay": 0.8, \
"default_tier": "night", "enabled": true, "phase": "all", "probe_set": "demo", "rule": "accumulate", "scope": "batch", "sensitivity": 1.5, \
"speculation": {"adaptive": false, "enabled": false, "max_tokens": 3, "min_confidence": 0.5, "tiers": ["exact", "night"]}, "tiers": \
[{"floor": "width-25", "level": "full", "name": "balanced", "soft_exit": true, "threshold_scale": 2.0}, {"floor": "full", "level": "skip", \
"name": "night", "soft_exit": false, "threshold_scale": 1.0}]}"""
"""as version 0.1 stores it"""


def test_policies_stored_by_version_0_1_are_read_and_keep_their_etags():
    assert Policy.from_dict(json.loads(_WRITTEN)) == _STORED
    younger = {field.name for _, field in list_knobs(Policy) if field.knob.since}
    body = {name: value for name, value in json.loads(json.dumps(_STORED.to_dict())).items() if name not in younger}
    assert json.dumps(body, sort_keys=True) == _WRITTEN


def test_the_demo_models_certificate_holds():
    message = json_format.Parse((ROOT / "probes" / "sedac_demo" / "policy.json").read_text(), control_pb2.Policy())
    policy = wire.policy_from_proto(message)
    assert get_knobs_digest(policy, policy.certificate.tier) == policy.certificate.knobs_sha256
    validate(policy)


def test_whole_numbers_digest_as_the_contract_carries_them():
    whole = dataclasses.replace(POLICY, sensitivity=1, checkpoints=(Checkpoint(layer=2, threshold=0),))
    carried = dataclasses.replace(POLICY, sensitivity=1.0, checkpoints=(Checkpoint(layer=2, threshold=-0.0),))
    assert get_knobs_digest(whole, "balanced") == get_knobs_digest(carried, "balanced")


def test_the_implied_tier_digests_as_the_listed_one():
    assert get_knobs_digest(Policy(), "balanced") == get_knobs_digest(Policy(tiers=(Tier(name="balanced"),)), "balanced")


def test_a_digest_of_no_tier_is_refused():
    with pytest.raises(ConfigError, match="'exact' is no tier of this policy; it has balanced, other"):
        get_knobs_digest(POLICY, "exact")


@given(valid_policies())
def test_a_certificate_of_a_policys_own_knobs_fits_unless_the_thresholds_move(policy):
    certified = certify(policy, policy.get_tiers()[-1].name)
    if not policy.adaptation.enabled:
        validate(certified, LAYOUT)
        return
    with pytest.raises(PolicyInvalid, match=r"adaptation.enabled: moves the thresholds"):
        validate(certified, LAYOUT)


@pytest.mark.parametrize(
    ("stated", "field", "words"),
    [
        ({"tier": "night"}, "certificate.tier", "'night' is no tier of this policy, it has balanced, other; certify again"),
        ({"tier": "exact"}, "certificate.tier", "'exact' is no tier"),
        ({"weights_sha256": "a" * 64}, "certificate.weights_sha256", "aaaaaaaaaaaa..., the engine has 111111111111...; certify again on this model"),
        ({"probe_set_sha256": "a" * 64}, "certificate.probe_set_sha256", "the engine has 222222222222...; certify again"),
        ({"weights_sha256": ""}, "certificate.weights_sha256", "'' is no sha256"),
        ({"data_sha256": "A" * 64}, "certificate.data_sha256", "64 of 0-9 and a-f"),
        ({"eps": 0.0}, "certificate.eps", "0.0 is outside (0, 1)"),
        ({"eps": float("nan")}, "certificate.eps", "nan is outside (0, 1)"),
        ({"delta": 1.0}, "certificate.delta", "1.0 is outside (0, 1)"),
        ({"num_requests": 0}, "certificate.num_requests", "0 is below 1"),
        ({"mean_loss": float("inf")}, "certificate.mean_loss", "not a finite number"),
        ({"upper_limit": float("nan")}, "certificate.upper_limit", "not a finite number"),
        ({"loss": ""}, "certificate.loss", "0 characters; give 1 to 256"),
        ({"engine": "x" * 257}, "certificate.engine", "257 characters"),
        ({"date": "yesterday"}, "certificate.date", "'yesterday' is no ISO 8601 date"),
    ],
)
def test_a_certificate_that_does_not_fit_is_refused_by_field(stated, field, words):
    with pytest.raises(PolicyInvalid) as refused:
        validate(certify(POLICY, **stated) if "tier" not in stated else dataclasses.replace(POLICY, certificate=_name_tier(stated["tier"])), LAYOUT)
    (violation,) = refused.value.violations
    assert violation.field == field
    assert words in violation.description


def _name_tier(tier: str):
    return dataclasses.replace(certify(POLICY).certificate, tier=tier)


@pytest.mark.parametrize("unknown", ["weights_sha256", "probe_set_sha256"])
def test_an_engine_that_does_not_know_its_own_refuses_every_certificate(unknown):
    with pytest.raises(PolicyInvalid, match=rf"certificate.{unknown}: .* can't be checked: the engine does not know its own.* with --force"):
        validate(certify(POLICY), dataclasses.replace(LAYOUT, **{unknown: ""}))


def test_one_line_for_people():
    assert certify(POLICY).certificate.describe() == "balanced certified: mismatch <= 0.05 at 95 %, 500 requests, 2026-11-21"
    assert "nll <= 0.001 at 99.9 %" in certify(POLICY, loss="nll", eps=0.001, delta=0.001).certificate.describe()


def test_policies_of_before_certificates_are_read():
    known = POLICY.to_dict()
    del known["certificate"]
    assert Policy.from_dict(known) == POLICY
    with pytest.raises(TypeError, match="speed"):
        Policy.from_dict({"certificate": {"speed": 1}})


@pytest.fixture
def model(tmp_path):
    """A directory with config.json and two files of weights."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "tiny"}')
    for name, content in (("a.safetensors", b"\1" * 1000), ("b.safetensors", b"\2" * 1000)):
        (directory / name).write_bytes(content)
    return directory


def test_the_same_files_digest_the_same_wherever_they_lie(model, tmp_path):
    before = get_weights_digest(str(model))
    (model / "tokenizer.json").write_text("{}")
    (model / "pytorch_model.bin").write_bytes(b"ignored where there are safetensors")
    assert get_weights_digest(str(model.rename(tmp_path / "elsewhere"))) == before


@pytest.mark.parametrize("change", ["config", "content", "name", "size", "missing", "moved"])
def test_any_change_of_the_weights_changes_the_digest(model, change):
    before = get_weights_digest(str(model))
    first, second = model / "a.safetensors", model / "b.safetensors"
    if change == "config":
        (model / "config.json").write_text('{"model_type": "tiny" }')
    elif change == "content":
        first.write_bytes(b"\1" * 999 + b"\2")
    elif change == "name":
        second.rename(model / "c.safetensors")
    elif change == "size":
        first.write_bytes(b"\1" * 999)
    elif change == "missing":
        second.unlink()
    else:  # the same bytes in a row, cut elsewhere
        first.write_bytes(b"\1" * 1000 + b"\2")
        second.write_bytes(b"\2" * 999)
    assert get_weights_digest(str(model)) != before


def test_bin_files_where_there_are_no_safetensors(model):
    for file in model.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ConfigError, match="holds no weights"):
        get_weights_digest(str(model))
    (model / "pytorch_model.bin").write_bytes(b"\1")
    before = get_weights_digest(str(model))
    (model / "pytorch_model.bin").write_bytes(b"\2")
    assert get_weights_digest(str(model)) != before


def test_large_files_are_told_apart_by_header_and_pieces(model):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1]}}).encode().ljust(100_000)
    size = 2**28 + 1

    def write(at: int, byte: bytes) -> str:
        with (model / "a.safetensors").open("wb") as file:  # sparse: only what is written takes space
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(size)
            file.seek(at)
            file.write(byte)
        return get_weights_digest(str(model))

    before = write(size - 1, b"\0")
    middle = (size - 2**16) * 31 // 63
    assert len({before, *(write(at, b"\1") for at in (90_000, middle, size - 1))}) == 4, "header behind the first piece, a middle piece, the end"
    assert write(middle - 1, b"\1") == before, "between the pieces nothing is read"


def test_models_that_cannot_be_read_are_refused_with_a_remedy(model, tmp_path):
    for name, words in (
        ("no/such-model", "not in the hub's local cache"),
        ("no/such/directory", "neither a directory nor a name on the hub"),
        (str(tmp_path), "holds no weights"),
    ):
        with pytest.raises(ConfigError, match=words):
            get_weights_digest(name, cache_dir=str(tmp_path / "cache"))
    with (model / "a.safetensors").open("wb") as file:
        file.write(b"\xff" * 8)
        file.truncate(2**28 + 1)
    with pytest.raises(ConfigError, match="states a header of"):
        get_weights_digest(str(model))
    (model / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json.*name the directory of a whole model"):
        get_weights_digest(str(model))


def test_hub_names_are_found_in_the_local_cache(model, tmp_path):
    repository = tmp_path / "cache" / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc")
    (repository / "snapshots").mkdir()
    before = get_weights_digest(str(model))
    model.rename(repository / "snapshots" / "0123abc")
    assert get_weights_digest("some/model", cache_dir=str(tmp_path / "cache")) == before
    assert get_weights_digest("some/model", revision="0123abc", cache_dir=str(tmp_path / "cache")) == before
    with pytest.raises(ConfigError, match="not in the hub's local cache"):
        get_weights_digest("some/model", revision="other", cache_dir=str(tmp_path / "cache"))


@given(st.floats(), st.floats())
def test_eps_and_delta_are_held_to_their_range(eps, delta):
    found = {v.field for v in certify(POLICY, eps=eps, delta=delta).certificate.find_violations()}
    assert found == {f"certificate.{name}" for name, value in (("eps", eps), ("delta", delta)) if not 0 < value < 1}
