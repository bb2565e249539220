"""Anything at all, sent to every method of the running control service: it answers with a status of its own making, and goes on.

SEDAC_TEST_FUZZ_SECONDS sets for how long (default 20).
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import hypothesis
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from hypothesis import strategies as st
from sedac.client.client import ControlClient
from sedac.contract import wire
from sedac.contract.v1 import control_pb2, probe_sets_pb2, rollouts_pb2
from sedac.control.base.services import SERVICES
from sedac.control.base.settings import ControlSettings
from sedac.policy.model import Audit, Checkpoint, Policy

from testing.control.running import RunningServer
from testing.probe_sets import make_set

SECONDS = float(os.environ.get("SEDAC_TEST_FUZZ_SECONDS", "20"))
_METHODS = [method for service in SERVICES for method in service.methods]
_ROUND = 100
_STREAM_SECONDS = 0.1
_CALL_SECONDS = 60
_MAX_DEPTH = 5
_GOOD = make_set("fuzz")
_WORDS = [
    "", "policies/default", "policies/other", "rollouts/1", "rollouts/0", "rollouts/99999999999999999999", "fuzz", "demo", "exact", "balanced",
    "full", "skip", "*", "policy", "checkpoints", "adaptation.enabled", "audit.share", "comment", "../x", "/etc/passwd", "\0", "a" * 300, "1", "-1",
    "e1", _GOOD.sha256, "sedac-probe-set/1", "first", "sedac", "speculation.tiers", "adapter",
]  # fmt: skip
_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), 2**31 - 1),
}
_POLICY = Policy(enabled=True, checkpoints=(Checkpoint(layer=2, threshold=0.5),), audit=Audit(share=0.1, max_mismatch=0.2))
_EXAMPLES: dict[str, list[bytes]] = {
    control_pb2.UpdatePolicyRequest.DESCRIPTOR.full_name: [
        control_pb2.UpdatePolicyRequest(policy=wire.policy_to_proto(policy)).SerializeToString()
        for policy in (_POLICY, replace(_POLICY, probe_set="fuzz"), replace(_POLICY, rule="accumulate"))
    ],
    rollouts_pb2.StartRolloutRequest.DESCRIPTOR.full_name: [
        rollouts_pb2.StartRolloutRequest(
            policy=wire.policy_to_proto(replace(_POLICY, default_tier="exact")),
            interval_seconds=0.1,
            bounds=rollouts_pb2.RolloutBounds(max_mismatch=0.1),
        ).SerializeToString()
    ],
    probe_sets_pb2.UploadProbeSetRequest.DESCRIPTOR.full_name: [part.SerializeToString() for part in _GOOD.make_parts(100_000)],
    control_pb2.EngineMessage.DESCRIPTOR.full_name: [
        control_pb2.EngineMessage(
            hello=control_pb2.EngineHello(engine_id="e1", num_layers=12, hidden_size=8, checkpoint_layers=[2, 5], max_rank=4)
        ).SerializeToString()
    ],
}
"""good messages, to be sent whole or damaged"""


def make_value(field: FieldDescriptor, depth: int) -> st.SearchStrategy:
    """Draw a value of a field's type, whatever the contract thinks of it."""
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_MESSAGE:
        return make_message(field.message_type, depth + 1)
    if kind == FieldDescriptor.CPPTYPE_STRING:
        if field.type == FieldDescriptor.TYPE_BYTES:
            return st.binary(max_size=200) | st.just(_GOOD.manifest)
        if field.name == "engine_id":  # every id is remembered for a day
            return st.sampled_from(["e1", "e2", "", "a" * 200, "\0"])
        return st.sampled_from(_WORDS) | st.text(st.characters(codec="utf-8"), max_size=30)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return st.sampled_from([0.0, 0.05, 0.5, 1.0]) | st.floats(width=32 if kind == FieldDescriptor.CPPTYPE_FLOAT else 64)
    return st.integers(0, 6) | st.integers(*_INTEGERS[kind])


@st.composite
def make_message(draw: st.DrawFn, descriptor: Descriptor, depth: int = 0):
    """Draw a message: any fields, any values."""
    message = message_factory.GetMessageClass(descriptor)()
    fields = [f for f in descriptor.fields if depth < _MAX_DEPTH or f.cpp_type != FieldDescriptor.CPPTYPE_MESSAGE]
    for field in draw(st.lists(st.sampled_from(fields), max_size=8, unique_by=lambda f: f.name)) if fields else ():
        if field.message_type and field.message_type.GetOptions().map_entry:
            parts = (make_value(field.message_type.fields_by_name[name], depth) for name in ("key", "value"))
            getattr(message, field.name).update(draw(st.dictionaries(*parts, max_size=5)))
        elif field.is_repeated:
            values = draw(st.lists(make_value(field, depth), max_size=3))
            getattr(message, field.name).extend(values)
        elif field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
            getattr(message, field.name).CopyFrom(draw(make_value(field, depth)))
        else:
            setattr(message, field.name, draw(make_value(field, depth)))
    return message


@st.composite
def make_payload(draw: st.DrawFn, descriptor: Descriptor) -> bytes:
    """Draw a request's bytes: a message, a damaged one, or noise."""
    kind = draw(st.sampled_from(["message", "message", "example", "damaged", "noise"]))
    if kind == "noise":
        return draw(st.binary(max_size=300))
    examples = _EXAMPLES.get(descriptor.full_name)
    data = draw(st.sampled_from(examples)) if examples and kind != "message" else draw(make_message(descriptor)).SerializeToString()
    if kind == "damaged" and data:
        at = draw(st.integers(0, len(data) - 1))
        data = data[:at] + draw(st.binary(max_size=3)) + data[at + draw(st.integers(0, 3)) :]
    return data


@st.composite
def make_call(draw: st.DrawFn) -> tuple[MethodDescriptor, list[bytes]]:
    method = draw(st.sampled_from(_METHODS))
    return method, draw(st.lists(make_payload(method.input_type), max_size=4 if method.client_streaming else 1))


def send(channel: grpc.Channel, method: MethodDescriptor, payloads: list[bytes]) -> grpc.StatusCode:
    """Make one call with raw bytes, take at most a few answers, and return how it ended; a status must be one of the service's own."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    make = channel.stream_stream if method.server_streaming else channel.stream_unary
    call = make(path, request_serializer=None, response_deserializer=None)
    try:
        if not method.server_streaming:
            call(iter(payloads), timeout=_CALL_SECONDS)
            return grpc.StatusCode.OK
        answers = call(iter(payloads), timeout=_STREAM_SECONDS)
        for number, _ in enumerate(answers):
            if number == 2:
                answers.cancel()
        return grpc.StatusCode.OK
    except grpc.RpcError as error:
        failed = error
    if not (method.server_streaming and failed.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)):
        check_status(path, failed)
    return failed.code()


def check_status(path: str, failed: grpc.RpcError) -> None:
    """Hold a refusal against what every one of the service's must be."""
    status, info = rpc_status.from_call(failed), error_details_pb2.ErrorInfo()
    assert status is not None, f"{path}: {failed}"
    assert status.details[0].Unpack(info), f"{path}: {failed}"
    assert info.domain == "sedac"
    assert failed.code() not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNIMPLEMENTED), f"{path}: {failed}"


@pytest.fixture
def running(tmp_path) -> Iterator[RunningServer]:
    settings = ControlSettings(
        port=0, metrics_port=0, database=tmp_path / "control.sqlite3", drain_seconds=0.2, max_calls_per_second=0, max_probe_set_bytes=1 << 20
    )
    server = RunningServer(settings)
    yield server
    server.stop()


def get_resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.timeout(SECONDS + 300)
def test_whatever_is_sent_the_service_answers_and_goes_on(running, caplog):
    caplog.set_level(logging.CRITICAL, "sedac")
    counts: Counter[str] = Counter()
    with (
        grpc.insecure_channel(running.address, options=[("grpc.max_receive_message_length", -1)]) as channel,
        ControlClient(running.address) as client,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        client.update_policy(Policy(checkpoints=(Checkpoint(layer=2, threshold=0.5),)))

        def fuzz_round(number: int) -> None:
            @hypothesis.seed(number)
            @hypothesis.settings(max_examples=_ROUND, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck))
            @hypothesis.given(make_call())
            def fuzz(call: tuple[MethodDescriptor, list[bytes]]) -> None:
                counts[send(channel, *call).name] += 1

            fuzz()

        started, number, resident = time.monotonic(), 0, 0
        while number == 0 or time.monotonic() - started < SECONDS:
            fuzz_round(number)
            number += 1
            assert health.Check(health_pb2.HealthCheckRequest(), timeout=_CALL_SECONDS).status == health_pb2.HealthCheckResponse.SERVING
            assert client.get_policy().revision >= 1
            resident = resident or get_resident_bytes()
        total, seconds = sum(counts.values()), time.monotonic() - started
        growth = (get_resident_bytes() - resident) >> 20
        print(f"{total} calls in {seconds:.0f} s, resident size grew by {growth} MiB after the first {_ROUND}: {dict(counts.most_common())}")
        assert growth < 500
    handled = {
        (sample.labels["grpc_service"], sample.labels["grpc_method"], sample.labels["grpc_code"]): sample.value
        for metric in running.server._metrics.handled.collect()
        for sample in metric.samples
        if sample.name.endswith("_total") and sample.value
    }
    bad = {key: value for key, value in handled.items() if key[2] in ("UNKNOWN", "INTERNAL")}
    assert not bad
    assert {key[1] for key in handled} >= {method.name for method in _METHODS}, "every method was called"
