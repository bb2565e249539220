"""Uploads of probe sets over the wire, and what a store is left with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import grpc
from grpc_status import rpc_status
from sedac.contract import wire
from sedac.contract.v1 import probe_sets_pb2, probe_sets_pb2_grpc

from testing.probe_sets import make_set

BARE = make_set(levels=False)
"""a set without levels of its own"""


def upload(stub: probe_sets_pb2_grpc.ProbeSetsStub, parts: Iterable[probe_sets_pb2.UploadProbeSetRequest]) -> probe_sets_pb2.ProbeSet:
    """Upload the parts, and return what became of them."""
    with translated():
        return stub.UploadProbeSet(iter(parts), timeout=30)


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Raise what a status says as the error of sedac.errors that it was; its code must be that error's."""
    try:
        yield
    except grpc.RpcError as error:
        status = rpc_status.from_call(error)
        found = wire.error_from_status(status) if status else None
        if found is None:
            raise AssertionError(f"no ErrorInfo: {error}") from error
        raise found from error


def list_files(directory: Path) -> set[str]:
    """Return what a store holds, beside what it always has."""
    return {str(path.relative_to(directory)) for path in directory.rglob("*")} - {"staging", ".lock"}


def get_state(stub: probe_sets_pb2_grpc.ProbeSetsStub, store: Path) -> tuple[str, set[str]]:
    """Return everything that a refusal must leave as it was."""
    return str(stub.ListProbeSets(probe_sets_pb2.ListProbeSetsRequest())), list_files(store)
