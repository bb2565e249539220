"""A real control service on a free loopback port, and engines that speak the real protocol."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence

import grpc
import pytest
from sedac.client.client import ControlClient
from sedac.contract import wire
from sedac.contract.credentials import read_credentials
from sedac.contract.v1 import control_pb2, control_pb2_grpc
from sedac.control.base.settings import ControlSettings
from sedac.control.server.server import ControlServer
from sedac.policy.model import Checkpoint, Policy

from tests.control.access import ROLES, PrincipalsFile
from tests.control.authority import Authority

FIRST = Policy(enabled=True, checkpoints=(Checkpoint(layer=2, threshold=0.5), Checkpoint(layer=5, threshold=0.25)))


class RunningServer:
    """A `ControlServer` on an event loop of its own thread."""

    def __init__(self, settings: ControlSettings) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        try:
            self.server = self._run(self._make(settings))
        except BaseException:
            self._end_loop()
            raise
        self.address = f"127.0.0.1:{self.server.port}"

    async def _make(self, settings: ControlSettings) -> ControlServer:
        server = ControlServer(settings)
        try:
            await server.start()
        except BaseException:
            await server.stop()
            raise
        return server

    def _run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    def stop(self) -> None:
        self._run(self.server.stop())
        self._end_loop()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


class FakeEngine:
    """An engine on the discovery stream that answers as it is told; everything but the engine is real."""

    def __init__(
        self,
        address: str,
        engine_id: str = "e1",
        *,
        answer: bool = True,
        initial: Policy | None = FIRST,
        layers: Sequence[int] = (2, 5, 8),
        levels: Sequence[str] = (),
        weights: str = "1" * 64,
        max_rank: int = 4,
        levels_sha256: str = "",
        draft: str = "",
        max_draft_tokens: int = 0,
        version: str = "",
        capabilities: Sequence[str] = (),
        hello: control_pb2.EngineHello | None = None,
    ) -> None:
        """Connect; `hello` holds what is sent beside the rest, as it is."""
        beside = hello
        self._outbox: queue.Queue[control_pb2.EngineMessage | None] = queue.Queue()
        self.pushes: queue.Queue[control_pb2.PolicyPush] = queue.Queue()
        self.error: grpc.RpcError | None = None
        self.refuse: str = ""
        self.answers = answer
        self._channel = grpc.insecure_channel(address)
        hello = control_pb2.EngineHello(engine_id=engine_id, model="m", num_layers=12, hidden_size=8, checkpoint_layers=layers, probe_set="demo")
        hello.levels.extend(levels)
        hello.weights_sha256, hello.probe_set_sha256 = weights, "2" * 64
        hello.max_rank, hello.levels_sha256 = max_rank, levels_sha256
        hello.draft, hello.max_draft_tokens = draft, max_draft_tokens
        hello.sedac_version = version
        hello.capabilities.extend(capabilities)
        if beside is not None:
            hello.MergeFrom(beside)
        if initial is not None:
            hello.initial_policy.CopyFrom(wire.policy_to_proto(initial))
        self.send(control_pb2.EngineMessage(hello=hello))
        self._call = control_pb2_grpc.DiscoveryStub(self._channel).Follow(iter(self._outbox.get, None))
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def send(self, message: control_pb2.EngineMessage) -> None:
        self._outbox.put(message)

    def answer(self, push: control_pb2.PolicyPush) -> None:
        answer = control_pb2.PolicyAnswer(nonce=push.nonce, revision=push.policy.revision, rollout=push.canary.rollout)
        if self.refuse:
            answer.error.code, answer.error.message, answer.revision = 3, self.refuse, push.policy.revision - 1
        self.send(control_pb2.EngineMessage(answer=answer))

    def _follow(self) -> None:
        try:
            for push in self._call:
                self.pushes.put(push)
                if self.answers:
                    self.answer(push)
        except grpc.RpcError as error:
            self.error = error

    def wait_for_end(self) -> grpc.RpcError | None:
        """Return how the stream ended; None: in peace."""
        self._thread.join(5)
        assert not self._thread.is_alive(), "the stream has not ended"
        return self.error

    def close(self) -> None:
        self._call.cancel()
        self._outbox.put(None)
        self._thread.join(5)
        self._channel.close()


@pytest.fixture
def settings(tmp_path) -> ControlSettings:
    return ControlSettings(port=0, metrics_port=0, database=tmp_path / "control.sqlite3", drain_seconds=0.2)


@pytest.fixture
def server(settings) -> Iterator[RunningServer]:
    running = RunningServer(settings)
    yield running
    running.stop()


@pytest.fixture
def client(server) -> Iterator[ControlClient]:
    with ControlClient(server.address, author="tester") as client:
        yield client


@pytest.fixture
def make_engine(server) -> Iterator[Callable[..., FakeEngine]]:
    engines: list[FakeEngine] = []

    def make(*args, **kwargs) -> FakeEngine:
        engines.append(FakeEngine(server.address, *args, **kwargs))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"), "authority")


@pytest.fixture(scope="module")
def other_authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("other"), "other-authority")


@pytest.fixture
def principals(tmp_path) -> PrincipalsFile:
    file = PrincipalsFile(tmp_path)
    for role in ROLES:
        file.add(role, role)
    return file


@pytest.fixture
def pair(authority):
    return authority.issue("localhost")


@pytest.fixture
def tls_settings(settings, principals, pair) -> ControlSettings:
    return settings.model_copy(update={"tls_cert": pair.cert, "tls_key": pair.key, "principals": principals.path})


@pytest.fixture
def start(request):
    """Start a service with the given settings; it is stopped when the test ends."""

    def start(settings: ControlSettings) -> RunningServer:
        running = RunningServer(settings)
        request.addfinalizer(running.stop)
        return running

    return start


@pytest.fixture
def open_channel(request, authority):
    """Open a channel that trusts the authority, with the given credentials beside."""

    def open_channel(server: RunningServer, **credentials) -> grpc.Channel:
        channel = read_credentials(**{"ca": authority.cert, **credentials}).open_channel(server.address)
        request.addfinalizer(channel.close)
        return channel

    return open_channel


@pytest.fixture
def mtls_settings(tls_settings, authority, principals) -> ControlSettings:
    lines = {
        "ops": {"name": "ops", "role": "operator", "certificate": "ops"},
        "audit": {"name": "audit", "role": "admin", "certificate": "spiffe://example/audit"},
        "host": {"name": "host", "role": "viewer", "certificate": "host.example"},
        "gone": {"name": "gone", "role": "admin", "certificate": "gone", "expires": "2020-01-01T00:00:00Z"},
    }
    for name, line in lines.items():
        principals.add_line(name, json.dumps(line))
    return tls_settings.model_copy(update={"tls_client_ca": authority.cert})
