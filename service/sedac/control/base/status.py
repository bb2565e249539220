"""Errors as gRPC statuses: ErrorInfo always, BadRequest for the fields at fault. The servicers alone use it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import grpc
from google.rpc import code_pb2
from grpc_status import rpc_status

from sedac.contract import wire
from sedac.errors import (
    ArtifactError,
    ControlUnavailable,
    EngineReplaced,
    FieldViolation,
    LimitExceeded,
    PermissionDenied,
    PolicyInvalid,
    ProbeSetExists,
    ProbeSetInUse,
    ProbeSetNotFound,
    RequestIdReused,
    RevisionCompacted,
    RevisionNotFound,
    RolloutConflict,
    RolloutNotFound,
    SedacError,
    StaleEtag,
    Unauthenticated,
)

_CODES: dict[type[SedacError], int] = {
    PolicyInvalid: code_pb2.INVALID_ARGUMENT,
    StaleEtag: code_pb2.ABORTED,
    RevisionNotFound: code_pb2.NOT_FOUND,
    RevisionCompacted: code_pb2.OUT_OF_RANGE,
    RequestIdReused: code_pb2.ALREADY_EXISTS,
    EngineReplaced: code_pb2.ABORTED,
    ControlUnavailable: code_pb2.UNAVAILABLE,
    ArtifactError: code_pb2.INVALID_ARGUMENT,
    ProbeSetNotFound: code_pb2.NOT_FOUND,
    ProbeSetExists: code_pb2.ALREADY_EXISTS,
    ProbeSetInUse: code_pb2.FAILED_PRECONDITION,
    RolloutNotFound: code_pb2.NOT_FOUND,
    RolloutConflict: code_pb2.FAILED_PRECONDITION,
    LimitExceeded: code_pb2.RESOURCE_EXHAUSTED,
    Unauthenticated: code_pb2.UNAUTHENTICATED,
    PermissionDenied: code_pb2.PERMISSION_DENIED,
}


def refuse(field: str, description: str) -> PolicyInvalid:
    """Make the error for one bad request field."""
    return PolicyInvalid([FieldViolation(field, description)])


@contextlib.asynccontextmanager
async def answering(context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
    """Turn an error raised on purpose into the call's status."""
    try:
        yield
    except SedacError as error:
        await context.abort_with_status(rpc_status.to_status(wire.error_to_status(error, _CODES.get(type(error), code_pb2.INTERNAL))))
