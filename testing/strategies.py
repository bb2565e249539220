"""Policies for property tests: whole ones with every knob, in the types that the contract can carry."""

from __future__ import annotations

import dataclasses

from hypothesis import strategies as st
from sedac.policy.certificate import Certificate
from sedac.policy.digest import get_knobs_digest
from sedac.policy.knob import Field, list_fields
from sedac.policy.model import EXACT, MAX_DRAFT_TOKENS, Adaptation, Audit, Checkpoint, Policy, Speculation, Tier

_numbers = st.floats(allow_nan=False)
_MOST = 1e9
"""Upper limit of drawn values of a knob that has none."""


def _draw_any(field: Field) -> st.SearchStrategy:
    """Any value, within limits or not, that the contract can carry; an empty word there means the default where that is another one."""
    if field.is_part:
        value = any_of(field.type)
    elif field.words:
        value = st.sampled_from(field.words)
    elif field.type is int:
        is_long = field.knob.le is not None and field.knob.le > 2**31
        value = st.integers(-(2**63), 2**63 - 1) if is_long else st.integers(-(2**31), 2**31 - 1)
    elif field.type is str:
        value = st.text(st.characters(codec="utf-8"), min_size=isinstance(field.default, str) and len(field.default) > 0, max_size=20)
    else:
        value = {float: _numbers, bool: st.booleans()}[field.type]
    if field.is_list:
        return st.lists(value, max_size=4).map(tuple)
    return st.none() | value if field.is_optional else value


def any_of(kind: type) -> st.SearchStrategy:
    """Objects of a class with knobs, each with any value."""
    return st.builds(kind, **{field.name: _draw_any(field) for field in list_fields(kind)})


any_policies = any_of(Policy)
"""valid or not; what is given to `validate` should be refused without harm"""


def valid_values(field: Field) -> st.SearchStrategy:
    """Values of a number, a flag or one of several words, within its own limits; of a list, its entries."""
    knob = field.knob
    low = knob.gt if knob.ge is None else knob.ge
    high = next((limit for limit in (knob.le, knob.lt) if limit is not None), _MOST)
    if field.words:
        value = st.sampled_from(field.words)
    elif field.type is int:
        value = st.integers(low + (knob.ge is None), int(high) - (knob.lt is not None))
    else:
        value = {float: lambda: st.floats(low, high, exclude_min=knob.ge is None, exclude_max=knob.lt is not None), bool: st.booleans}[field.type]()
    return st.none() | value if field.is_optional else value


def _valid_of(kind: type, **known: st.SearchStrategy) -> st.SearchStrategy:
    """Objects of a class with knobs; `known` are those that other knobs have a say in."""
    return st.builds(kind, **{f.name: known[f.name] if f.name in known else valid_values(f) for f in list_fields(kind)})


@st.composite
def valid_policies(
    draw: st.DrawFn, layers: tuple[int, ...] = (2, 5, 8), levels: tuple[str, ...] = ("full", "skip"), max_draft_tokens: int = MAX_DRAFT_TOKENS
) -> Policy:
    """Draw a policy that `validate` accepts for an engine with these checkpoint layers and levels, and room for these draft tokens."""
    rule = draw(st.sampled_from(["first", "accumulate", "single"]))
    chosen = sorted(draw(st.sets(st.sampled_from(layers), max_size=1 if rule == "single" else len(layers))))
    names = draw(st.lists(st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True).filter(lambda n: n != "exact"), max_size=3, unique=True))
    floors = st.sampled_from([level for level in levels if level != "skip"])
    soft = st.booleans() if rule == "accumulate" else st.just(False)
    adaptation = _valid_of(
        Adaptation,
        enabled=st.just(False) if rule == "accumulate" else st.booleans(),
        target_exit_rates=st.tuples(*[st.floats(0, 1)] * len(chosen)),
        min_threshold=st.floats(0, 1),
        max_threshold=st.floats(1, _MOST),
    )
    speculation = _valid_of(
        Speculation,
        max_tokens=st.integers(0, max_draft_tokens),
        tiers=st.lists(st.sampled_from([EXACT, *(names or ["balanced"])]), unique=True).map(tuple),
    )
    tiers = [draw(_valid_of(Tier, name=st.just(n), floor=floors, level=st.sampled_from(levels), soft_exit=soft)) for n in names]
    return draw(
        _valid_of(
            Policy,
            probe_set=st.just(""),
            checkpoints=st.just(tuple(draw(_valid_of(Checkpoint, layer=st.just(layer))) for layer in chosen)),
            rule=st.just(rule),
            tiers=st.just(tuple(tiers)),
            default_tier=st.sampled_from([*(names or ["balanced"]), EXACT]),
            adaptation=adaptation,
            certificate=st.none(),
            audit=_valid_of(Audit, share=st.floats(0.001, 1)),
            speculation=speculation,
        )
    )


def certify(policy: Policy, tier: str = "balanced", *, weights: str = "1" * 64, probe_set: str = "2" * 64, **knobs: object) -> Policy:
    """Return the policy with a certificate of its own knobs that `validate` accepts for these weights and this probe set."""
    stated = {
        "tier": tier,
        "model": "tiny",
        "weights_sha256": weights,
        "probe_set_sha256": probe_set,
        "knobs_sha256": get_knobs_digest(policy, tier),
        "engine": "vLLM 0.32.0, SEDAC 0.1.0, cpu, float32",
        "loss": "mismatch",
        "eps": 0.05,
        "delta": 0.05,
        "procedure": "wsr",
        "num_requests": 500,
        "mean_loss": 0.031,
        "upper_limit": 0.047,
        "data_sha256": "3" * 64,
        "date": "2026-11-21",
    }
    return dataclasses.replace(policy, certificate=Certificate(**(stated | knobs)))
