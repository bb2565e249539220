"""Who is calling, and what they may do."""

from __future__ import annotations

import contextvars
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote

import grpc

from sedac import wire
from sedac.control.status import refuse

Role = Literal["viewer", "operator", "admin", "engine"]
_MAX_AUTHOR_CHARS = 128


@dataclass(frozen=True, kw_only=True)
class Principal:
    """Somebody who proved who they are."""

    name: str
    role: Role
    kind: Literal["token", "certificate"]
    engine_id: str = ""
    """of role engine: the only engine that it may speak for; empty: any"""

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who makes a change, as revisions and the audit log keep it."""

    principal: str
    """who was authenticated, such as "token:alice"; "guard" or "rollout" where the service acts by itself; "-" where auth is off"""
    author: str
    """what the caller called itself; the principal's name where it said nothing, the peer where auth is off too"""
    peer: str


_principal: contextvars.ContextVar[Principal | None] = contextvars.ContextVar("sedac_principal", default=None)


def get_principal() -> Principal | None:
    """Return who makes the running call; None where auth is off."""
    return _principal.get()


def get_caller(context: grpc.aio.ServicerContext) -> Caller:
    """Return who makes the running call, for its revision and its audit entry.

    Raises:
        PolicyInvalid: what the caller calls itself is too long.
    """
    principal = get_principal()
    metadata = dict(context.invocation_metadata() or ())
    author = unquote(str(metadata.get(wire.AUTHOR_METADATA) or (principal.name if principal else context.peer())))
    if len(author) > _MAX_AUTHOR_CHARS:
        raise refuse(f"metadata {wire.AUTHOR_METADATA}", f"{len(author)} characters; at most {_MAX_AUTHOR_CHARS}")
    return Caller(principal=str(principal or "-"), author=author, peer=context.peer())
