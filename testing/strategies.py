"""Policies for property tests: whole ones with every knob, in the types that the contract can carry."""

from __future__ import annotations

import dataclasses

from hypothesis import strategies as st
from sedac.policy.certificate import Certificate, get_knobs_digest
from sedac.policy.model import EXACT, MAX_DRAFT_TOKENS, Adaptation, Audit, Checkpoint, Policy, Speculation, Tier

_numbers = st.floats(allow_nan=False)
_int32 = st.integers(-(2**31), 2**31 - 1)
_names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)

checkpoints = st.builds(Checkpoint, layer=_int32, threshold=_numbers, weight=_numbers, target=_numbers)
tiers = st.builds(Tier, name=_names, floor=_names, level=_names, threshold_scale=_numbers, soft_exit=st.booleans())
adaptations = st.builds(
    Adaptation,
    enabled=st.booleans(),
    frozen=st.booleans(),
    target_exit_rates=st.lists(_numbers, max_size=4).map(tuple),
    alpha=_numbers,
    warmup_steps=_int32,
    window_tokens=_int32,
    min_threshold=_numbers,
    max_threshold=_numbers,
    generation=_int32,
)
audits = st.builds(
    Audit,
    share=_numbers,
    max_mismatch=st.none() | _numbers,
    max_nll_difference=st.none() | _numbers,
    confidence=_numbers,
    action=st.sampled_from(["rollback", "exact"]),
)
speculations = st.builds(
    Speculation,
    enabled=st.booleans(),
    max_tokens=_int32,
    min_confidence=st.none() | _numbers,
    adaptive=st.booleans(),
    tiers=st.lists(_names, max_size=4).map(tuple),
)
_by_type = {"float": _numbers, "int": st.integers(-(2**63), 2**63 - 1), "str": st.text(st.characters(codec="utf-8"), max_size=20)}
certificates = st.builds(Certificate, **{field.name: _by_type[field.type] for field in dataclasses.fields(Certificate)})
any_policies = st.builds(
    Policy,
    enabled=st.booleans(),
    probe_set=st.text(st.characters(codec="utf-8"), max_size=20),
    checkpoints=st.lists(checkpoints, max_size=4).map(tuple),
    phase=st.sampled_from(["decode", "all"]),
    scope=st.sampled_from(["token", "batch"]),
    rule=st.sampled_from(["first", "accumulate", "single"]),
    decay=_numbers,
    sensitivity=_numbers,
    tiers=st.lists(tiers, max_size=4).map(tuple),
    default_tier=_names,
    allow_overrides=st.booleans(),
    adaptation=adaptations,
    certificate=st.none() | certificates,
    audit=audits,
    speculation=speculations,
)
"""valid or not; what is given to `validate` should be refused without harm"""


@st.composite
def valid_policies(
    draw: st.DrawFn, layers: tuple[int, ...] = (2, 5, 8), levels: tuple[str, ...] = ("full", "skip"), max_draft_tokens: int = MAX_DRAFT_TOKENS
) -> Policy:
    """Draw a policy that `validate` accepts for an engine with these checkpoint layers and levels, and room for these draft tokens."""
    rule = draw(st.sampled_from(["first", "accumulate", "single"]))
    chosen = sorted(draw(st.sets(st.sampled_from(layers), max_size=1 if rule == "single" else len(layers))))
    positive = st.floats(0, 1e9)
    names = draw(st.lists(st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True).filter(lambda n: n != "exact"), max_size=3, unique=True))
    floors = [level for level in levels if level != "skip"]
    return Policy(
        enabled=draw(st.booleans()),
        checkpoints=tuple(
            Checkpoint(layer=layer, threshold=draw(positive), weight=draw(positive), target=draw(st.floats(0.01, 10))) for layer in chosen
        ),
        phase=draw(st.sampled_from(["decode", "all"])),
        scope=draw(st.sampled_from(["token", "batch"])),
        rule=rule,
        decay=draw(st.floats(0, 1)),
        sensitivity=draw(st.floats(0, 10)),
        tiers=tuple(
            Tier(
                name=name,
                floor=draw(st.sampled_from(floors)),
                level=draw(st.sampled_from(levels)),
                threshold_scale=draw(positive),
                soft_exit=rule == "accumulate" and draw(st.booleans()),
            )
            for name in names
        ),
        default_tier=draw(st.sampled_from([*names, "exact"])) if names else draw(st.sampled_from(["balanced", "exact"])),
        allow_overrides=draw(st.booleans()),
        adaptation=Adaptation(
            enabled=rule != "accumulate" and draw(st.booleans()),
            frozen=draw(st.booleans()),
            target_exit_rates=tuple(draw(st.floats(0, 1)) for _ in chosen),
            alpha=draw(st.floats(0.001, 1)),
            warmup_steps=draw(st.integers(0, 1_000_000)),
            window_tokens=draw(st.integers(64, 65536)),
            generation=draw(st.integers(0, 2**31 - 1)),
        ),
        audit=Audit(
            share=draw(st.floats(0.001, 1)),
            max_mismatch=draw(st.none() | st.floats(0, 1)),
            max_nll_difference=draw(st.none() | st.floats(0, 1)),
            confidence=draw(st.floats(0.5, 0.999)),
            action=draw(st.sampled_from(["rollback", "exact"])),
        ),
        speculation=Speculation(
            enabled=draw(st.booleans()),
            max_tokens=draw(st.integers(0, max_draft_tokens)),
            min_confidence=draw(st.none() | st.floats(0, 1)),
            adaptive=draw(st.booleans()),
            tiers=tuple(draw(st.lists(st.sampled_from([EXACT, *(names or ["balanced"])]), unique=True))),
        ),
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
