"""What one caller, or all of them, may ask of the service at one time; what is too much is refused with the remedy."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sedac.contract.v1 import control_pb2, control_pb2_grpc, probe_sets_pb2
from sedac.control.access.limits import TokenBucket
from sedac.control.base.metrics import ControlMetrics

from testing.control.access import PrincipalsFile, call, find_error, wait_until
from testing.control.engines import FIRST, FakeEngine
from testing.control.running import RunningServer

GET, WATCH = "/sedac.control.v1.Control/GetStatus", "/sedac.control.v1.Control/WatchStatus"
FOLLOW = "/sedac.control.v1.Discovery/Follow"
OK, EXHAUSTED = grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture
def start(request, settings) -> Callable[..., RunningServer]:
    def start(**changes) -> RunningServer:
        running = RunningServer(settings.model_copy(update=changes))
        request.addfinalizer(running.stop)
        return running

    return start


@pytest.fixture
def open_channel(request):
    def open_channel(server: RunningServer) -> grpc.Channel:
        channel = grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)])
        request.addfinalizer(channel.close)
        return channel

    return open_channel


def _watch(channel: grpc.Channel, metadata=()):
    watch = control_pb2_grpc.ControlStub(channel).WatchStatus(control_pb2.WatchStatusRequest(interval_seconds=60), metadata=metadata)
    next(watch)
    return watch


def _get_limited(running: RunningServer, limit: str) -> float:
    return running.server._metrics.limited.labels(limit)._value.get()


def test_streams_of_one_caller_are_limited_and_others_have_their_own(start, open_channel, tmp_path):
    file = PrincipalsFile(tmp_path)
    file.add("alice", "viewer")
    file.add("bob", "viewer")
    running = start(max_streams=3, principals=file.path)
    channel, other = open_channel(running), open_channel(running)
    alice, bob = file.make_metadata("alice"), file.make_metadata("bob")
    held = [_watch(c, alice) for c in (channel, other, other)]
    code, details, reason = find_error(channel, WATCH, alice)
    assert (code, reason) == (EXHAUSTED, "LimitExceeded")
    assert "token:alice has 3 streams already, which is the limit" in details
    assert "SEDAC_CONTROL_MAX_STREAMS" in details
    assert _get_limited(running, "streams") == 1
    assert call(channel, GET, alice) is OK, "a call is no stream"
    assert call(channel, WATCH, bob) is OK
    held.pop().cancel()
    wait_until(lambda: call(channel, WATCH, alice) is OK, "the place of an ended stream is free again")
    for watch in held:
        watch.cancel()


def test_streams_are_counted_by_address_where_nobody_is_asked(start, open_channel):
    running = start(max_streams=2)
    held = [_watch(open_channel(running)) for _ in range(2)]
    code, details, _ = find_error(open_channel(running), WATCH)
    assert code is EXHAUSTED
    assert details.startswith("ipv4:127.0.0.1 has 2 streams")
    for watch in held:
        watch.cancel()


def test_calls_of_all_together_are_limited_and_the_health_check_still_answers(start, open_channel):
    running = start(max_calls=3)
    channel = open_channel(running)
    held = [_watch(open_channel(running)) for _ in range(3)]
    code, details, reason = find_error(channel, GET)
    assert (code, reason) == (EXHAUSTED, "LimitExceeded")
    assert "3 calls run already" in details
    assert "SEDAC_CONTROL_MAX_CALLS" in details
    health = channel.unary_unary("/grpc.health.v1.Health/Check")
    assert health(b"", timeout=20) == b"\x08\x01", "SERVING"
    for watch in held:
        watch.cancel()
    wait_until(lambda: call(channel, GET) is OK, "there is room again")


def test_a_caller_that_calls_too_often_is_refused_until_it_slows_down(start, open_channel, tmp_path):
    file = PrincipalsFile(tmp_path)
    file.add("alice", "viewer")
    file.add("bob", "viewer")
    running = start(max_calls_per_second=2, principals=file.path)
    channel, alice = open_channel(running), file.make_metadata("alice")
    answers = [find_error(channel, GET, alice) for _ in range(60)]
    num_done = sum(code is OK for code, _, _ in answers)
    assert 4 <= num_done < 60
    code, details, reason = next(answer for answer in answers if answer[0] is not OK)
    assert (code, reason) == (EXHAUSTED, "LimitExceeded")
    assert "token:alice calls over 2 times a second" in details
    assert "SEDAC_CONTROL_MAX_CALLS_PER_SECOND" in details
    assert _get_limited(running, "rate") == 60 - num_done
    assert call(channel, GET, file.make_metadata("bob")) is OK
    wait_until(lambda: call(channel, GET, alice) is OK, "the rate allows a call again")


def test_no_rate_means_no_limit(start, open_channel):
    channel = open_channel(start(max_calls_per_second=0))
    assert {call(channel, GET) for _ in range(100)} == {OK}


@given(st.floats(0.1, 1e4), st.floats(1, 1e4), st.lists(st.floats(0, 10), max_size=60))
def test_a_bucket_never_gives_more_than_its_burst_and_its_rate(rate, burst, pauses):
    now = 0.0
    bucket = TokenBucket(rate, burst, lambda: now)
    num_taken = 0
    for pause in pauses:
        now += pause
        num_taken += bucket.take()
        assert num_taken <= burst + rate * now + 1e-6
    now += 1 / rate + burst / rate
    assert bucket.take(), "a caller that waits is let through again"


def test_whoever_opens_streams_and_sends_nothing_holds_none(start, open_channel):
    """Slow loris: unary calls, uploads and followers without a message."""
    running = start(first_message_seconds=0.5)
    channel, silence = open_channel(running), queue.Queue()
    stubs = [
        channel.stream_unary(GET),  # a unary call to the server, whose message never comes
        channel.stream_stream(FOLLOW),
        channel.stream_stream(WATCH),
    ]
    calls = [
        stub.future(iter(silence.get, None), timeout=30) if hasattr(stub, "future") else stub(iter(silence.get, None), timeout=30)
        for stub in stubs
        for _ in range(20)
    ]
    for held in calls:
        assert held.code() is EXHAUSTED
        assert "no message came within 0.5 s (SEDAC_CONTROL_FIRST_MESSAGE_SECONDS)" in held.details()
    assert _get_limited(running, "silence") == 60
    wait_until(lambda: running.server._gate._limits._num_calls == 0, "no call is held")
    assert not running.server._gate._limits._streams
    assert call(channel, GET) is OK
    for _ in calls:
        silence.put(None)


def test_connections_that_never_speak_are_closed(start):
    running = start(first_message_seconds=0.5)
    sockets = [socket.create_connection(("127.0.0.1", running.server.port)) for _ in range(50)]
    for connection in sockets:
        connection.settimeout(20)
        with connection:
            while connection.recv(4096):  # the service's own settings frame, then the end
                pass
    with grpc.insecure_channel(running.address) as channel:
        assert call(channel, GET) is OK


def test_idle_connections_go_and_an_engines_stays(start, open_channel):
    running = start(max_idle_seconds=1)
    engine = FakeEngine(running.address, initial=FIRST)
    assert engine.pushes.get(timeout=20).policy.revision == 1
    channel = open_channel(running)
    states: queue.Queue[grpc.ChannelConnectivity] = queue.Queue()
    channel.subscribe(states.put)
    assert call(channel, GET) is OK
    while states.get(timeout=20) is not grpc.ChannelConnectivity.READY:
        pass
    assert states.get(timeout=20) is grpc.ChannelConnectivity.IDLE, "the service closed it"
    assert call(channel, GET) is OK, "and it comes back when it is needed"
    status = control_pb2_grpc.ControlStub(channel).GetStatus(control_pb2.GetStatusRequest(), timeout=20)
    assert [e.state for e in status.engines] == [control_pb2.ENGINE_STATE_SYNCED]
    assert engine.error is None
    engine.close()


def test_connections_are_renewed_where_an_age_is_set(start, open_channel):
    running = start(max_age_seconds=0.5)
    watch = _watch(open_channel(running))
    with pytest.raises(grpc.RpcError):
        for _ in watch:
            pass
    assert watch.code() is grpc.StatusCode.UNAVAILABLE


def test_messages_over_the_limit_are_refused(start, open_channel):
    channel = open_channel(start(max_message_bytes=1 << 16))
    code, details, _ = find_error(channel, GET, message=b"\x00" * (1 << 17))
    assert code is EXHAUSTED
    assert "131072" in details


def test_a_fleet_behind_one_address_passes_the_defaults(start, open_channel):
    """256 engines with one address, each with its stream and a download beside, and twenty people who watch."""
    running = start(first_message_seconds=120.0)  # how fast a busy machine brings 256 first messages is not the question
    channels = [open_channel(running) for _ in range(4)]
    outbox: queue.Queue[None] = queue.Queue()
    streams = []
    for number in range(256):
        hello = control_pb2.EngineMessage(hello=control_pb2.EngineHello(engine_id=f"e{number}"))
        follow = control_pb2_grpc.DiscoveryStub(channels[number % 4]).Follow
        streams.append(follow(_say_once(hello, outbox)))
        assert call(channels[number % 4], "/sedac.control.v1.ProbeSets/DownloadProbeSet", message=_NOTHING) is not EXHAUSTED
    watches = [_watch(channels[number % 4]) for number in range(20)]
    stub = control_pb2_grpc.ControlStub(channels[0])
    wait_until(lambda: len(stub.GetStatus(control_pb2.GetStatusRequest(), timeout=20).engines) == 256, "all have joined", 60)
    assert all(_get_limited(running, limit) == 0 for limit in ("calls", "streams", "rate", "silence"))
    for stream in (*streams, *watches):
        stream.cancel()
    for _ in streams:
        outbox.put(None)


_NOTHING = probe_sets_pb2.DownloadProbeSetRequest(name="nothing").SerializeToString()


def _say_once(message, outbox):
    yield message
    yield from iter(outbox.get, None)


def test_limits_are_shown_from_the_start():
    metrics = ControlMetrics()
    for limit in ("calls", "streams", "rate", "silence"):
        assert metrics.limited.labels(limit)._value.get() == 0


def test_many_callers_at_once_are_counted_right(start, open_channel):
    """Calls that end in every way give their place back."""
    running = start(max_calls=16, max_streams=8)
    channel = open_channel(running)

    def work() -> None:
        for number in range(30):
            find_error(channel, (GET, WATCH, "/sedac.control.v1.Control/UpdatePolicy")[number % 3], timeout=(0.001, 20)[number % 2])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    limits = running.server._gate._limits
    wait_until(lambda: limits._num_calls == 0 and not limits._streams, "every place is given back")
    assert call(channel, GET) is OK
