"""Certificates in the control service: taken where they fit every attached engine, dropped with the knobs that they were for."""

from __future__ import annotations

import dataclasses
import logging

import grpc
import pytest
from sedac.contract import wire
from sedac.contract.v1 import control_pb2, control_pb2_grpc
from sedac.errors import PolicyInvalid
from sedac.policy.model import Adaptation, Policy, Speculation, Tier

from testing.control.engines import FIRST
from testing.strategies import certify

CERTIFIED = certify(dataclasses.replace(FIRST, tiers=(Tier(name="balanced"), Tier(name="night"))))


def _find_certification(client) -> str:
    return control_pb2.Certification.Name(client.get_status().certification)


def test_status_says_whether_the_policy_is_certified(client, make_engine):
    assert _find_certification(client) == "CERTIFICATION_UNSPECIFIED"
    make_engine().pushes.get(timeout=5)
    assert _find_certification(client) == "CERTIFICATION_UNCERTIFIED"
    made = client.update_policy(CERTIFIED)
    assert _find_certification(client) == "CERTIFICATION_CERTIFIED"
    assert wire.policy_from_proto(client.get_policy(made.revision)) == CERTIFIED, "the store keeps it whole"


@pytest.mark.parametrize(
    ("changed", "fields"),
    [
        ({"checkpoints": FIRST.checkpoints[:1]}, ["checkpoints"]),
        ({"decay": 0.5}, ["decay"]),
        ({"tiers": (Tier(name="balanced", threshold_scale=2.0),)}, ["tiers"]),
        ({"tiers": (Tier(name="night"),), "default_tier": "night"}, ["tiers", "default_tier"]),
        ({"adaptation": Adaptation(enabled=True, target_exit_rates=(0.5, 0.5))}, ["adaptation.enabled", "adaptation.target_exit_rates"]),
    ],
)
def test_a_change_of_certified_knobs_drops_the_certificate_and_says_so(client, caplog, changed, fields):
    client.update_policy(CERTIFIED)
    with caplog.at_level(logging.WARNING, "sedac.control.policy.servicer"):
        made = client.update_policy(dataclasses.replace(Policy(), **changed), fields=fields)
    assert not made.HasField("certificate")
    assert "revision 2 is UNCERTIFIED: it leaves out the certificate of the one before (balanced certified: mismatch <= 0.05" in caplog.text
    assert _find_certification(client) == "CERTIFICATION_UNCERTIFIED"


@pytest.mark.parametrize(
    ("changed", "fields"),
    [
        ({"enabled": False}, ["enabled"]),
        ({"tiers": (Tier(name="balanced"), Tier(name="night", level="full"))}, ["tiers"]),
        ({"default_tier": "exact", "allow_overrides": True}, ["default_tier", "allow_overrides"]),
        ({"decay": CERTIFIED.decay}, ["decay"]),
        ({"speculation": Speculation(enabled=False)}, ["speculation"]),
        ({"speculation": Speculation(max_tokens=3, adaptive=False)}, ["speculation.max_tokens", "speculation.adaptive"]),
    ],
)
def test_other_changes_keep_it(client, caplog, changed, fields):
    client.update_policy(CERTIFIED)
    made = wire.policy_from_proto(client.update_policy(dataclasses.replace(Policy(), **changed), fields=fields))
    assert made == dataclasses.replace(CERTIFIED, **changed)
    assert "UNCERTIFIED" not in caplog.text


def test_a_certificate_can_be_changed_alone_and_is_held_against_the_knobs_in_force(client):
    client.update_policy(FIRST)
    assert client.update_policy(certify(FIRST), fields=["certificate"]).certificate.tier == "balanced"
    assert not client.update_policy(Policy(), fields=["certificate"]).HasField("certificate")
    for fields in (["certificate"], ["certificate", "decay"]):
        with pytest.raises(PolicyInvalid, match=r"certificate.knobs_sha256: .* knobs were changed"):
            client.update_policy(certify(dataclasses.replace(FIRST, sensitivity=0.5)), fields=fields)


@pytest.mark.parametrize("validate_only", [True, False])
def test_one_engine_with_other_weights_refuses_it_by_name(client, make_engine, validate_only):
    make_engine("e1").pushes.get(timeout=5)
    make_engine("e2", weights="a" * 64).pushes.get(timeout=5)
    with pytest.raises(PolicyInvalid) as refused:
        client.update_policy(CERTIFIED, validate_only=validate_only)
    (violation,) = refused.value.violations
    assert violation.field == "certificate.weights_sha256"
    assert violation.description.startswith("111111111111..., the engine has aaaaaaaaaaaa...; certify again on this model")
    assert violation.description.endswith("--force` (engine e2)"), "nothing is cut off"
    assert client.get_policy().revision == 1


def test_an_engine_of_before_certificates_can_take_none(client, make_engine):
    make_engine(weights="").pushes.get(timeout=5)
    with pytest.raises(PolicyInvalid, match=r"certificate.weights_sha256: 111111111111... can't be checked: .* with --force \(engine e1\)"):
        client.update_policy(CERTIFIED)


def test_a_misfit_is_invalid_argument(server):
    bad = control_pb2.UpdatePolicyRequest(policy=wire.policy_to_proto(certify(FIRST, num_requests=0)))
    with grpc.insecure_channel(server.address) as channel:
        stub = control_pb2_grpc.ControlStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.UpdatePolicy(bad)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "certificate.num_requests: 0 is below 1" in refused.value.details()


def test_rollback_brings_the_certificate_back_where_it_still_fits(client, make_engine):
    client.update_policy(CERTIFIED)
    client.update_policy(FIRST)
    assert wire.policy_from_proto(client.rollback(1)) == CERTIFIED
    client.update_policy(FIRST)
    make_engine(weights="a" * 64).pushes.get(timeout=5)
    with pytest.raises(PolicyInvalid, match=r"certificate\.weights_sha256"):
        client.rollback(1)


def test_a_late_misfit_does_not_keep_the_others_from_changes(client, make_engine):
    make_engine("e1").pushes.get(timeout=5)
    client.update_policy(CERTIFIED)
    make_engine("e2", weights="a" * 64).pushes.get(timeout=5)
    made = client.update_policy(Policy(enabled=False), fields=["enabled"])
    assert (made.enabled, made.certificate.tier) == (False, "balanced")
