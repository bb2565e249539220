"""The committed generated code is what the contract generates; messages and plain Python convert without loss."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sedac import wire
from sedac.control.v1 import control_pb2
from sedac.errors import PolicyInvalid
from sedac.policy import MAX_CHECKPOINTS, Checkpoint, Policy, validate

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


@given(_policies)
def test_validation_accepts_exactly_the_good_policies(policy):
    layers, thresholds = [c.layer for c in policy.checkpoints], [c.threshold for c in policy.checkpoints]
    good = layers == sorted(set(layers)) and all(n >= 0 for n in layers) and all(0 <= t < float("inf") for t in thresholds)
    if good:
        validate(policy)
    else:
        with pytest.raises(PolicyInvalid):
            validate(policy)


def test_too_many_checkpoints_are_refused_without_being_looked_at():
    with pytest.raises(PolicyInvalid, match=f"1000000 checkpoints; at most {MAX_CHECKPOINTS}"):
        validate(Policy(checkpoints=(Checkpoint(layer=0, threshold=0),) * 1_000_000))
