"""Fixtures for whoever needs a control service: a real one on a free loopback port, its client, its engines, its principals.

A conftest imports those that its tests name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import grpc
import pytest
from sedac.client.client import ControlClient
from sedac.contract.credentials import read_credentials
from sedac.control.base.settings import ControlSettings

from testing.control.access import ROLES, PrincipalsFile
from testing.control.authority import Authority
from testing.control.engines import FakeEngine
from testing.control.running import RunningServer


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
