"""The decision rule against one written again in plain Python, token by token, at its edges too."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sedac.probe.cascade import Knobs, decide, get_soft_ratio

numbers = st.one_of(st.floats(0, 4, width=32), st.sampled_from([0.0, 0.5, 1.0, math.inf, math.nan]))
tokens = st.lists(st.tuples(numbers, st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.floats(0, 1, width=32)), max_size=9)
knobs = st.builds(
    Knobs,
    threshold=st.sampled_from([0.0, 0.5, 1.0, 3e38]),
    weight=st.sampled_from([0.0, 0.3, 1.0]),
    target=st.sampled_from([0.25, 0.5, 0.9]),
    rule=st.sampled_from(["first", "single", "accumulate"]),
    scope=st.sampled_from(["token", "batch"]),
    decay=st.sampled_from([0.0, 0.9, 1.0]),
)


def naive(risk: float, scale: float, confidence: float, k: Knobs) -> tuple[bool, float]:
    f = lambda x: torch.tensor(x, dtype=torch.float32).item()  # noqa: E731  the rule is defined in fp32
    limit = f(k.threshold * scale)
    if k.rule != "accumulate":
        return risk < limit, confidence
    now = f(f(limit - risk) / limit) if risk < limit else 0.0
    confidence = f(f(confidence * f(k.decay)) + f(now * f(k.weight)))
    return confidence >= f(k.target), confidence


@settings(deadline=None)
@given(tokens, knobs)
def test_the_rule_equals_plain_python(rows, k):
    risk, scale, confidence = (torch.tensor([row[i] for row in rows], dtype=torch.float32) for i in range(3))
    sure, after = decide(risk, scale, confidence, k)
    expected = [naive(r, s, c, k) for r, s, c in zip(risk.tolist(), scale.tolist(), confidence.tolist(), strict=True)]
    confident = [e[0] for e in expected]
    if k.scope == "batch":
        confident = [all(confident)] * len(rows)
    assert sure.tolist() == confident
    torch.testing.assert_close(after, torch.tensor([e[1] for e in expected], dtype=torch.float32), rtol=1e-6, atol=1e-7, equal_nan=True)


def test_edges():
    ask = lambda risk, **k: decide(torch.tensor(risk), torch.ones(len(risk)), torch.zeros(len(risk)), Knobs(**k))[0].tolist()  # noqa: E731
    assert ask([0.5, 0.4999, 0.0], threshold=0.5) == [False, True, True]  # a tie is not confident
    assert ask([math.nan, math.inf], threshold=1e30) == [False, False]
    assert ask([0.0, 1.0], threshold=0.0) == [False, False]
    assert ask([], threshold=1.0) == []
    assert ask([0.1, 0.2], threshold=1.0, scope="batch") == [True, True]
    assert ask([0.1, 2.0], threshold=1.0, scope="batch") == [False, False]
    assert ask([0.1, math.nan], threshold=1.0, scope="batch") == [False, False]


def test_published_weights_cannot_pass_their_ceiling():
    """Weights .3/.4/.3 and decay .9 reach .3 * .81 + .4 * .9 + .3 = .903 at most, as facts about v6.1 say."""
    confidence = torch.zeros(1)
    for weight in (0.3, 0.4, 0.3):
        _, confidence = decide(torch.zeros(1), torch.ones(1), confidence, Knobs(threshold=1.0, weight=weight, target=0.95, rule="accumulate"))
    assert abs(confidence.item() - 0.903) < 1e-6


def test_soft_ratio_is_the_published_one():
    confidence = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(get_soft_ratio(confidence), torch.tensor([(math.tanh(-1) + 1) / 2, 0.5, (math.tanh(1) + 1) / 2]))
