"""Whatever bytes the service sends: a push is read whole and valid, or refused with fields; nothing else ever comes out."""

from __future__ import annotations

import contextlib

from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st
from sedac.agent.pushes import Orders, read_push
from sedac.contract import wire
from sedac.contract.v1 import control_pb2
from sedac.errors import PolicyInvalid
from sedac.policy.check import validate
from sedac.policy.model import Policy

from testing.strategies import any_policies, valid_policies

_int64 = st.integers(-(2**63), 2**63 - 1)
NOT_PROTO = b"\xff" * 8


def _read(push: control_pb2.PolicyPush) -> Orders | None:
    """Return the orders, or None for a refusal that names its fields."""
    violations = []
    try:
        return read_push(push)
    except PolicyInvalid as refused:
        violations += refused.violations
    assert violations
    assert all(v.field and v.description for v in violations)
    return None


@given(any_policies, any_policies, _int64, _int64, st.floats())
def test_any_policy_is_read_valid_or_refused(policy, candidate, revision, rollout, share):
    push = control_pb2.PolicyPush(policy=wire.policy_to_proto(policy, revision=revision))
    push.candidate.CopyFrom(control_pb2.Candidate(rollout=rollout, policy=wire.policy_to_proto(candidate), share=share))
    orders = _read(push)
    if orders is not None:
        validate(orders.policy)
        assert orders.revision > 0
        assert orders.candidate is not None
        validate(orders.candidate.policy)
        assert orders.candidate.rollout > 0
        assert 0 <= orders.candidate.share <= 1


@given(valid_policies(), valid_policies(), st.integers(1, 2**63 - 1), st.integers(1, 2**63 - 1), st.floats(0, 1))
def test_every_valid_push_is_read_as_it_was_meant(policy, candidate, revision, rollout, share):
    push = control_pb2.PolicyPush(policy=wire.policy_to_proto(policy, revision=revision))
    push.candidate.CopyFrom(control_pb2.Candidate(rollout=rollout, policy=wire.policy_to_proto(candidate), share=share))
    orders = read_push(control_pb2.PolicyPush.FromString(push.SerializeToString()))
    assert (orders.policy, orders.revision) == (policy, revision)
    assert orders.candidate is not None
    assert (orders.candidate.policy, orders.candidate.rollout, orders.candidate.share) == (candidate, rollout, share)


@given(st.binary(max_size=300))
@example(NOT_PROTO)
def test_bytes_that_happen_to_be_a_push_are_read_or_refused(data):
    with contextlib.suppress(DecodeError):
        _read(control_pb2.PolicyPush.FromString(data))
    with contextlib.suppress(DecodeError):
        push = control_pb2.PolicyPush(policy=wire.policy_to_proto(Policy(), revision=1))
        push.MergeFromString(data)
        _read(push)
