"""The decision rule against its definition, over all risks including NaN, infinities and ties."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from sedac.probe.cascade import choose_exits

_risks = st.lists(st.one_of(st.floats(min_value=0, width=32), st.just(float("nan")), st.just(0.5)), max_size=20)
_thresholds = st.one_of(st.floats(min_value=0, max_value=2.0**100, width=32), st.just(0.5))


@given(_risks, _thresholds)
def test_token_scope_decides_each_token_alone(risks, threshold):
    assert choose_exits(torch.tensor(risks), threshold, "token").tolist() == [risk < threshold for risk in risks]


@given(_risks, _thresholds)
def test_batch_scope_lets_all_go_or_none(risks, threshold):
    everyone = all(risk < threshold for risk in risks)
    assert choose_exits(torch.tensor(risks), threshold, "batch").tolist() == [everyone] * len(risks)


@given(_risks)
def test_threshold_zero_exits_nothing(risks):
    for scope in ("token", "batch"):
        assert not choose_exits(torch.tensor([*risks, 0.0]), 0.0, scope).any()
