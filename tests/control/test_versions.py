"""Versions in messages: the service tells its own, notes the engines', and refuses what a newer client asks for by number."""

from __future__ import annotations

import grpc
import pytest
from rich.console import Console
from sedac import __version__
from sedac.contract import wire
from sedac.contract.v1 import control_pb2, control_pb2_grpc, rollouts_pb2, rollouts_pb2_grpc
from sedac.ctl.engine_tables import make_engines_table, make_fleet_table
from sedac.ctl.tables import make_status
from sedac.versions import CAPABILITIES

from testing.control.engines import FIRST
from testing.control.measuring import wait_for

NEWER = b"\xa0\x06\x07"
"""field 100, a varint, 7: what a newer contract would add"""


def _render(renderable) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_pushes_and_the_status_carry_the_version_and_the_capabilities(client, make_engine):
    assert client.get_status().version == __version__, "before there is a policy too"
    engine = make_engine()
    push = engine.pushes.get(timeout=10)
    status = client.get_status()
    for message in (push, status):
        assert (message.version, tuple(message.capabilities)) == (__version__, CAPABILITIES)


def test_the_tables_show_the_versions(client, make_engine):
    engine = make_engine(version="7.8.9")
    engine.pushes.get(timeout=10)
    status = client.get_status()
    assert "7.8.9" in _render(make_fleet_table(status.engines))
    assert "7.8.9" in _render(make_engines_table(status.engines))
    assert f"control service: SEDAC {__version__}" in _render(make_status(status))
    status.ClearField("version")
    assert "control service: SEDAC" not in _render(make_status(status)), "0.1.0 tells none"


def test_an_engine_that_names_no_capability_is_warned_of_once(server, make_engine, caplog):
    make_engine(version="0.1.0").pushes.get(timeout=10)
    make_engine("e2", version=__version__, capabilities=CAPABILITIES).pushes.get(timeout=10)
    (told,) = [r.getMessage() for r in caplog.records if "drops knobs" in r.getMessage()]
    assert told == "engine e1 runs SEDAC 0.1.0, which drops knobs that it does not know; those added since have no effect there: update it"


@pytest.mark.parametrize("validate_only", [False, True])
def test_a_knob_that_the_service_does_not_know_is_refused_by_its_number(server, client, validate_only):
    client.update_policy(FIRST)
    policy = wire.policy_to_proto(FIRST)
    policy.adaptation.MergeFromString(NEWER)
    with grpc.insecure_channel(server.address) as channel:
        update = control_pb2.UpdatePolicyRequest(policy=policy, validate_only=validate_only)
        with pytest.raises(grpc.RpcError) as refused:
            control_pb2_grpc.ControlStub(channel).UpdatePolicy(update)
        with pytest.raises(grpc.RpcError) as refused_too:
            rollouts_pb2_grpc.RolloutsStub(channel).StartRollout(rollouts_pb2.StartRolloutRequest(policy=policy))
    for error in (refused.value, refused_too.value):
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        told = f"is the number of a field that this control service's SEDAC {__version__} does not know; update the control service, or leave"
        assert f"adaptation.100: {told}" in error.details()
    assert client.get_policy().revision == 1


def test_what_a_newer_engine_started_with_is_not_seeded_in_part(client, make_engine, caplog):
    initial = wire.policy_to_proto(FIRST)
    initial.MergeFromString(NEWER)
    engine = make_engine(initial=None, hello=control_pb2.EngineHello(initial_policy=initial))
    wait_for(lambda: client.get_status().engines, "the engine")
    assert not client.get_status().HasField("policy")
    client.update_policy(FIRST)
    assert engine.pushes.get(timeout=10).policy.revision == 1, "it is followed all the same"
    assert "engine e1: what it started with does not become the first policy: policy refused: 100: is the number of a field" in caplog.text
