"""A control service with little room for probe sets."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from sedac.contract.v1 import probe_sets_pb2_grpc
from sedac.control.base.settings import ControlSettings


@pytest.fixture
def settings(tmp_path) -> ControlSettings:
    return ControlSettings(
        port=0, metrics_port=0, database=tmp_path / "control.sqlite3", drain_seconds=0.2, max_probe_set_bytes=40_000, max_probe_sets_bytes=20_000,
        max_uploads=2, upload_silence_seconds=20,
    )  # fmt: skip


@pytest.fixture
def stub(server):
    with grpc.insecure_channel(server.address) as channel:
        yield probe_sets_pb2_grpc.ProbeSetsStub(channel)


@pytest.fixture
def store(settings) -> Path:
    return settings.database.parent / "probe-sets"
