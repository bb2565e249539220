"""The committed generated code is what the contract generates; messages and plain Python convert without loss."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
from google.rpc import status_pb2
from hypothesis import given
from hypothesis import strategies as st
from sedac import wire
from sedac.control.v1 import control_pb2
from sedac.errors import EngineReplaced, FieldViolation, PolicyInvalid, RequestIdReused, RevisionNotFound, StaleEtag, StoreFailed
from sedac.policy import Checkpoint, Policy
from sedac.stats import CheckpointStats, Stats

ROOT = Path(__file__).resolve().parents[1]
_checkpoints = st.lists(st.builds(Checkpoint, layer=st.integers(-(2**31), 2**31 - 1), threshold=st.floats(allow_nan=False)), max_size=5).map(tuple)
_policies = st.builds(
    Policy,
    enabled=st.booleans(),
    probe_set=st.text(st.characters(codec="utf-8"), max_size=20),
    checkpoints=_checkpoints,
    phase=st.sampled_from(["decode", "all"]),
    scope=st.sampled_from(["token", "batch"]),
)


def test_generated_code_is_up_to_date(tmp_path):
    spec = importlib.util.spec_from_file_location("generate", ROOT / "proto" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    generate.generate(tmp_path)
    made = {p.relative_to(tmp_path): p.read_text() for p in tmp_path.rglob("*.py*")}
    assert len(made) == 3
    for path, text in made.items():
        assert (ROOT / "service" / path).read_text() == text, f"{path} is stale: run `make proto`"


@given(_policies)
def test_policies_survive_the_wire_and_json(policy):
    message = control_pb2.Policy.FromString(wire.policy_to_proto(policy).SerializeToString())
    assert wire.policy_from_proto(message) == policy
    assert Policy.from_dict(policy.to_dict()) == policy


@pytest.mark.parametrize("field", ["phase", "scope"])
def test_enum_values_of_a_newer_contract_are_refused_by_name(field):
    with pytest.raises(PolicyInvalid, match=f"{field}: 7 is unknown"):
        wire.policy_from_proto(control_pb2.Policy(**{field: 7}))


def test_unset_enums_mean_what_the_contract_says():
    assert wire.policy_from_proto(control_pb2.Policy()) == Policy(phase="decode", scope="token")


_ascii = st.characters(codec="ascii")


@given(st.lists(st.builds(FieldViolation, st.text(_ascii, max_size=300), st.text(_ascii, max_size=1000)), min_size=1, max_size=300))
def test_refusals_survive_the_wire_and_fit_a_trailer(violations):
    status = wire.error_to_status(PolicyInvalid(violations), 3)
    assert len(status.SerializeToString()) + len(status.message) < 8 << 10
    read = wire.error_from_status(status)
    assert isinstance(read, PolicyInvalid)
    for sent, came in zip(violations, read.violations, strict=False):
        assert came.description in (sent.description, sent.description[:253] + "...")


@pytest.mark.parametrize("kind", [StaleEtag, RevisionNotFound, RequestIdReused, StoreFailed, EngineReplaced])
def test_errors_survive_the_wire(kind):
    read = wire.error_from_status(wire.error_to_status(kind("value 3, limit 2: do this"), 10))
    assert type(read) is kind
    assert str(read) == "value 3, limit 2: do this"


def test_foreign_statuses_are_not_taken_for_ours():
    assert wire.error_from_status(status_pb2.Status(code=13, message="x")) is None
    assert wire.error_from_status(wire.error_to_status(ValueError("x"), 13)) is None


@given(st.builds(Stats, **{f.name: st.integers(0, 2**62) for f in dataclasses.fields(Stats) if f.name != "checkpoints"}))
def test_counters_survive_the_wire(stats):
    stats = dataclasses.replace(stats, checkpoints=(CheckpointStats(layer=3, num_evaluated=7, num_exited=5),))
    report = control_pb2.EngineReport.FromString(wire.stats_to_report(stats).SerializeToString())
    for field in dataclasses.fields(Stats):
        if field.name != "checkpoints":
            assert getattr(report, field.name) == getattr(stats, field.name)
    assert [(c.layer, c.num_evaluated, c.num_exited) for c in report.checkpoints] == [(3, 7, 5)]
