"""Validation accepts exactly the good policies, names every field at fault, and never guesses."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sedac.errors import PolicyInvalid
from sedac.policy import MAX_CHECKPOINTS, Checkpoint, Layout, Policy, validate

LAYOUT = Layout(num_layers=12, hidden_size=8, checkpoint_layers=(2, 5, 8), probe_set="demo")
_layers = st.one_of(st.integers(-3, 12), st.sampled_from(LAYOUT.checkpoint_layers))
_thresholds = st.one_of(st.floats(), st.floats(0, 10), st.just(-0.0))
_policies = st.builds(
    Policy,
    enabled=st.booleans(),
    probe_set=st.sampled_from(["", "demo", "other"]),
    checkpoints=st.lists(st.builds(Checkpoint, layer=_layers, threshold=_thresholds), max_size=4, unique_by=lambda c: c.layer)
    .map(lambda cs: sorted(cs, key=lambda c: c.layer))
    .map(tuple),
    phase=st.sampled_from(["decode", "all"]),
    scope=st.sampled_from(["token", "batch"]),
)


def _find_bad_fields(policy: Policy, layout: Layout | None) -> set[str]:
    bad, previous = set(), -1
    for i, c in enumerate(policy.checkpoints):
        if c.layer <= previous or c.layer < 0 or (layout and c.layer not in layout.checkpoint_layers):
            bad.add(f"checkpoints[{i}].layer")
        if math.isnan(c.threshold) or c.threshold < 0 or c.threshold == math.inf:
            bad.add(f"checkpoints[{i}].threshold")
        previous = max(previous, c.layer)
    if layout and policy.probe_set not in ("", layout.probe_set):
        bad.add("probe_set")
    return bad


@given(_policies, st.sampled_from([None, LAYOUT]), st.randoms())
def test_exactly_the_fields_at_fault_are_named(policy, layout, random):
    if random.random() < 0.3:
        shuffled = list(policy.checkpoints)
        random.shuffle(shuffled)
        policy = Policy(**{**vars(policy), "checkpoints": tuple(shuffled)})
    bad = _find_bad_fields(policy, layout)
    if not bad:
        validate(policy, layout)
        return
    with pytest.raises(PolicyInvalid) as refused:
        validate(policy, layout)
    assert {v.field for v in refused.value.violations} == bad


@pytest.mark.parametrize("field", ["phase", "scope"])
def test_unknown_words_are_refused_by_name(field):
    with pytest.raises(PolicyInvalid, match=f"{field}: 'sometimes' is unknown; use"):
        validate(Policy(**{field: "sometimes"}))


def test_too_many_checkpoints_are_refused_without_being_looked_at():
    validate(Policy(checkpoints=tuple(Checkpoint(layer=i, threshold=0) for i in range(MAX_CHECKPOINTS))))
    with pytest.raises(PolicyInvalid, match=f"1000000 checkpoints; at most {MAX_CHECKPOINTS}"):
        validate(Policy(checkpoints=(Checkpoint(layer=0, threshold=0),) * 1_000_000))


def test_from_dict_refuses_what_it_does_not_know():
    with pytest.raises(TypeError, match="speed"):
        Policy.from_dict({"speed": 1})
    with pytest.raises(TypeError, match="threshold"):
        Policy.from_dict({"checkpoints": [{"layer": 1}]})
