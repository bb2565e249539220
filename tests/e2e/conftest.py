"""The whole product as a user starts it, asked through the OpenAI client and gRPC.

Starting takes longer than most tests, so tests share what is served (tests/conftest.py keeps them on one worker) and leave it as it was.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sedac.client.client import ControlClient
from sedac.contract import wire

from testing.forked import MEMORY
from testing.served import Served, start, stop


@pytest.fixture(scope="package", autouse=True)
def _memory() -> Iterator[None]:
    """Let what these tests start keep memory that was freed."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in MEMORY.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="package")
def served(tmp_path_factory) -> Iterator[Served]:
    running = start(tmp_path_factory.mktemp("serve"), "--dtype", "float32")
    yield running
    assert stop(running) == 0, running.log.read_text()[-4000:]


@pytest.fixture
def control(served) -> Iterator[ControlClient]:
    """a client with time to find a connection dead (30 s) and to ask again on a new one, as a machine that stalls for seconds needs"""
    with ControlClient(served.control_address, author="e2e", timeout_seconds=60) as client:
        yield from _keep_policy(client)


def _keep_policy(client: ControlClient) -> Iterator[ControlClient]:
    """Yield a client; in the end the policy in force is what it was."""
    before = client.get_policy()
    yield client
    if client.get_policy().revision != before.revision:
        client.wait_until_synced(client.update_policy(wire.policy_from_proto(before)).revision, 60)
