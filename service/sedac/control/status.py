"""Errors as gRPC statuses: ErrorInfo always, BadRequest for the fields at fault. The servicers alone use it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import grpc
from google.rpc import code_pb2
from grpc_status import rpc_status

from sedac import wire
from sedac.errors import (
    ControlUnavailable,
    EngineReplaced,
    FieldViolation,
    PolicyInvalid,
    RequestIdReused,
    RevisionNotFound,
    SedacError,
    StaleEtag,
)

_CODES: dict[type[SedacError], int] = {
    PolicyInvalid: code_pb2.INVALID_ARGUMENT,
    StaleEtag: code_pb2.ABORTED,
    RevisionNotFound: code_pb2.NOT_FOUND,
    RequestIdReused: code_pb2.ALREADY_EXISTS,
    EngineReplaced: code_pb2.ABORTED,
    ControlUnavailable: code_pb2.UNAVAILABLE,
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
