"""Validation accepts exactly the good policies, names every field at fault, and never guesses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sedac.errors import FieldViolation, PolicyInvalid
from sedac.policy.check import validate
from sedac.policy.layout import Layout
from sedac.policy.model import MAX_CHECKPOINTS, MAX_DRAFT_TOKENS, MAX_TIERS, Adaptation, Checkpoint, Policy, Speculation, Tier

from testing.strategies import any_policies, valid_policies

LAYOUT = Layout(num_layers=12, hidden_size=8, checkpoint_layers=(2, 5, 8), probe_set="demo", levels=("full", "skip", "width-25"))
DRAFTING = replace(LAYOUT, draft="adapter", max_draft_tokens=4)
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


@given(any_policies, st.sampled_from([None, LAYOUT, DRAFTING]))
def test_any_policy_is_accepted_or_refused_by_name(policy, layout):
    violations: tuple[FieldViolation, ...] = ()
    try:
        validate(policy, layout)
    except PolicyInvalid as refused:
        violations = refused.violations or (FieldViolation("nothing", "refused without a reason"),)
    assert {v.field.split("[")[0].split(".")[0] for v in violations} <= set(Policy.__dataclass_fields__)


@given(valid_policies(levels=LAYOUT.levels))
def test_valid_policies_are_accepted_with_every_knob(policy):
    validate(policy)
    validate(policy, LAYOUT)


@given(valid_policies(levels=LAYOUT.levels))
def test_what_an_engine_has_no_room_to_draft_is_refused_by_that_engine_alone(policy):
    knobs, room = policy.speculation, DRAFTING.max_draft_tokens
    if knobs.max_tokens <= room:
        validate(policy, DRAFTING)
        return
    with pytest.raises(PolicyInvalid) as refused:
        validate(policy, DRAFTING)
    (violation,) = refused.value.violations
    assert violation.field == "speculation.max_tokens"
    assert f"{knobs.max_tokens} is over {room}, for which this engine was started" in violation.description
    assert "SEDAC_DRAFT_TOKENS" in violation.description


_TWO = (Checkpoint(layer=2, threshold=1), Checkpoint(layer=5, threshold=1))


@pytest.mark.parametrize(
    ("knobs", "field", "words"),
    [
        ({"checkpoints": (Checkpoint(layer=2, threshold=1, weight=-1),)}, "checkpoints[0].weight", "1 is neutral"),
        ({"checkpoints": (Checkpoint(layer=2, threshold=1, weight=math.nan),)}, "checkpoints[0].weight", "finite number >= 0"),
        ({"checkpoints": (Checkpoint(layer=2, threshold=1, target=0),)}, "checkpoints[0].target", "0.5 is usual"),
        ({"rule": "single", "checkpoints": _TWO}, "rule", "2 are given; use first"),
        ({"decay": 1.1}, "decay", "outside 0..1"),
        ({"sensitivity": math.nan}, "sensitivity", "0 turns it off"),
        ({"tiers": (Tier(name="exact"),), "default_tier": "exact"}, "tiers[0].name", "can't be redefined"),
        ({"tiers": (Tier(name="a"), Tier(name="a")), "default_tier": "a"}, "tiers[1].name", "listed twice"),
        ({"tiers": (Tier(name="A b"),), "default_tier": "exact"}, "tiers[0].name", "a-z, 0-9"),
        ({"tiers": (Tier(name="a", level="width-99"),), "default_tier": "a"}, "tiers[0].level", "it has full, skip, width-25"),
        ({"tiers": (Tier(name="a", level="x" * 65),), "default_tier": "a"}, "tiers[0].level", "65 characters"),
        ({"tiers": (Tier(name="a", floor="skip"),), "default_tier": "a"}, "tiers[0].floor", "without any MLP"),
        ({"tiers": (Tier(name="a", threshold_scale=math.inf),), "default_tier": "a"}, "tiers[0].threshold_scale", "1 is neutral"),
        ({"tiers": (Tier(name="a", soft_exit=True),), "default_tier": "a"}, "tiers[0].soft_exit", "use rule accumulate"),
        ({"tiers": tuple(Tier(name=f"t{i}") for i in range(MAX_TIERS + 1)), "default_tier": "t0"}, "tiers", "32 tiers; at most 31"),
        ({"tiers": (Tier(name="a"),)}, "default_tier", "it has a, exact"),
        ({"checkpoints": _TWO, "adaptation": Adaptation(enabled=True, target_exit_rates=(0.5,))}, "adaptation.target_exit_rates", "1 rates for 2"),
        ({"adaptation": Adaptation(target_exit_rates=(0.5, 1.5))}, "adaptation.target_exit_rates[1]", "outside 0..1"),
        ({"adaptation": Adaptation(target_exit_rates=(0.5,) * 257)}, "adaptation.target_exit_rates", "at most 256"),
        ({"adaptation": Adaptation(enabled=True), "rule": "accumulate"}, "adaptation.enabled", "use rule first or single"),
        ({"adaptation": Adaptation(alpha=0)}, "adaptation.alpha", "0.1 is usual"),
        ({"adaptation": Adaptation(warmup_steps=-1)}, "adaptation.warmup_steps", "-1 is outside"),
        ({"adaptation": Adaptation(window_tokens=10)}, "adaptation.window_tokens", "64..65536"),
        ({"adaptation": Adaptation(min_threshold=2, max_threshold=1)}, "adaptation.min_threshold", "min_threshold <= max_threshold"),
        ({"adaptation": Adaptation(generation=2**31)}, "adaptation.generation", "outside 0.."),
        ({"speculation": Speculation(max_tokens=-1)}, "speculation.max_tokens", "-1 is outside 0..16; 0 drafts as many"),
        ({"speculation": Speculation(max_tokens=MAX_DRAFT_TOKENS + 1)}, "speculation.max_tokens", "17 is outside 0..16"),
        ({"speculation": Speculation(min_confidence=1.1)}, "speculation.min_confidence", "1.1 is outside 0..1; leave it out"),
        ({"speculation": Speculation(min_confidence=-0.1)}, "speculation.min_confidence", "outside 0..1"),
        ({"speculation": Speculation(min_confidence=math.nan)}, "speculation.min_confidence", "nan is outside 0..1"),
        ({"speculation": Speculation(min_confidence=math.inf)}, "speculation.min_confidence", "inf is outside 0..1"),
        ({"speculation": Speculation(tiers=("exact", "night"))}, "speculation.tiers[1]", "'night' is no tier of this policy, it has exact, balanced"),
        ({"speculation": Speculation(tiers=("exact",) * 1_000_000)}, "speculation.tiers", "1000000 tiers; name each once"),
    ],
)
def test_each_knob_has_its_limit_and_its_remedy(knobs, field, words):
    with pytest.raises(PolicyInvalid) as refused:
        validate(Policy(**knobs), LAYOUT)
    (violation,) = refused.value.violations
    assert violation.field == field
    assert words in violation.description


def test_without_tiers_there_is_one_named_balanced():
    assert [t.name for t in Policy().get_tiers()] == ["balanced"]
    validate(Policy(default_tier="exact"))


@pytest.mark.parametrize("field", ["phase", "scope", "rule"])
def test_unknown_words_are_refused_by_name(field):
    with pytest.raises(PolicyInvalid, match=f"{field}: 'sometimes' is unknown; use"):
        validate(Policy(**{field: "sometimes"}))


def test_too_many_checkpoints_are_refused_without_being_looked_at():
    validate(Policy(checkpoints=tuple(Checkpoint(layer=i, threshold=0) for i in range(MAX_CHECKPOINTS))))
    with pytest.raises(PolicyInvalid, match=f"1000000 checkpoints; at most {MAX_CHECKPOINTS}"):
        validate(Policy(checkpoints=(Checkpoint(layer=0, threshold=0),) * 1_000_000))


def test_policies_of_before_speculation_are_read_and_speculate():
    known = Policy(enabled=True, checkpoints=_TWO).to_dict()
    del known["speculation"]
    assert Policy.from_dict(known) == Policy(enabled=True, checkpoints=_TWO)
    assert Policy.from_dict(known).speculation.enabled
    assert Policy.from_dict({"speculation": {"enabled": False}}).speculation == Speculation(enabled=False)
    with pytest.raises(TypeError, match="speed"):
        Policy.from_dict({"speculation": {"speed": 1}})


def test_from_dict_refuses_what_it_does_not_know():
    with pytest.raises(TypeError, match="speed"):
        Policy.from_dict({"speed": 1})
    with pytest.raises(TypeError, match="threshold"):
        Policy.from_dict({"checkpoints": [{"layer": 1}]})
