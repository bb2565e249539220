"""The typed client against a real control service: errors come back as they were raised, streams are let go."""

from __future__ import annotations

import getpass
import socket
import time

import pytest
from sedac.client.client import ControlClient
from sedac.errors import ControlUnavailable, NotSynced, PolicyInvalid, RequestIdReused, RevisionNotFound, SedacError, StaleEtag
from sedac.policy.model import Checkpoint, Policy

from testing.control.engines import FIRST
from testing.control.running import RunningServer


def test_errors_come_back_as_they_were_raised(client):
    with pytest.raises(RevisionNotFound):
        client.get_policy()
    client.update_policy(FIRST, request_id="a")
    with pytest.raises(StaleEtag, match="read the policy again and retry"):
        client.update_policy(FIRST, etag="old")
    with pytest.raises(RequestIdReused):
        client.update_policy(Policy(), request_id="a")
    with pytest.raises(PolicyInvalid) as refused:
        client.update_policy(Policy(checkpoints=(Checkpoint(layer=4, threshold=1), Checkpoint(layer=4, threshold=1))))
    (violation,) = refused.value.violations
    assert (violation.field, violation.description) == ("checkpoints[1].layer", "4 follows 4; give each layer once, in ascending order")
    with pytest.raises(SedacError, match="RESOURCE_EXHAUSTED"):
        client.update_policy(FIRST, comment="x" * (2 << 20))


def test_an_absent_or_silent_service_is_told_from_a_refusal():
    with ControlClient("127.0.0.1:1") as absent:
        with pytest.raises(ControlUnavailable, match=r"127.0.0.1:1 does not answer \(UNAVAILABLE\); is it running\?"):
            absent.get_status()
        with pytest.raises(ControlUnavailable):
            next(absent.watch_status())
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with ControlClient(address, timeout_seconds=0.2) as client, pytest.raises(ControlUnavailable, match="DEADLINE_EXCEEDED"):
            client.get_status()


def test_a_stopping_service_says_so_to_its_watchers(settings):
    running = RunningServer(settings)
    with ControlClient(running.address) as client:
        watch = client.watch_status(60)
        next(watch)
        running.stop()
        with pytest.raises(ControlUnavailable, match="is stopping; watch again when it is back"):
            next(watch)


def test_the_author_is_the_user_or_the_number_of_a_nameless_one(server, monkeypatch):
    with ControlClient(server.address) as client:
        assert client.update_policy(FIRST).author == getpass.getuser()
    monkeypatch.setattr(getpass, "getuser", lambda: {}["uid not found"])
    with ControlClient(server.address) as client:
        assert client.update_policy(FIRST).author.startswith("uid ")


def test_waiting_takes_no_older_revision_for_the_wanted_one(client, make_engine):
    make_engine()
    assert client.wait_until_synced(1, 5).engines[0].active_revision == 1
    started = time.monotonic()
    with pytest.raises(NotSynced, match=r"revision 2 is not in force everywhere after 0.3 s: waiting for e1"):
        client.wait_until_synced(2, 0.3)
    assert time.monotonic() - started >= 0.3


def test_waiting_fails_where_no_engine_is_connected(client):
    client.update_policy(FIRST)
    with pytest.raises(NotSynced, match="no engine is connected"):
        client.wait_until_synced(1, 0)
