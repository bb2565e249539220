"""Who is calling, and what they may do: one table of rules for every method; what is not in it is denied.

Callers prove themselves with a bearer token, or with a certificate where the service asks for one; a token that is sent decides.
"""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import grpc

from sedac.contract import wire
from sedac.control.access.principals import Entry, Role, read_principals
from sedac.control.access.reloading import Reloading
from sedac.control.base.metrics import ControlMetrics
from sedac.control.base.status import refuse
from sedac.errors import PermissionDenied, Unauthenticated

_log = logging.getLogger(__name__)
_VIEWER: tuple[Role, ...] = ("viewer", "operator", "admin")
_OPERATOR: tuple[Role, ...] = ("operator", "admin")
_ADMIN: tuple[Role, ...] = ("admin",)
_ENGINE: tuple[Role, ...] = ("engine",)

OPEN = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"})
"""The methods for everybody, because whoever starts and stops the service has no token."""
RULES: Mapping[str, tuple[Role, ...]] = {
    "/sedac.control.v1.Control/GetPolicy": _VIEWER,
    "/sedac.control.v1.Control/UpdatePolicy": _OPERATOR,
    "/sedac.control.v1.Control/ListPolicyRevisions": _VIEWER,
    "/sedac.control.v1.Control/RollbackPolicy": _OPERATOR,
    "/sedac.control.v1.Control/WatchPolicy": _VIEWER,
    "/sedac.control.v1.Control/GetStatus": _VIEWER,
    "/sedac.control.v1.Control/WatchStatus": _VIEWER,
    "/sedac.control.v1.Control/ListEngines": _VIEWER,
    "/sedac.control.v1.Control/WatchEngines": _VIEWER,
    "/sedac.control.v1.Discovery/Follow": _ENGINE,
    "/sedac.control.v1.ProbeSets/UploadProbeSet": _OPERATOR,
    "/sedac.control.v1.ProbeSets/ListProbeSets": _VIEWER,
    "/sedac.control.v1.ProbeSets/GetProbeSet": _VIEWER,
    "/sedac.control.v1.ProbeSets/DeleteProbeSet": _ADMIN,
    "/sedac.control.v1.ProbeSets/DownloadProbeSet": (*_ENGINE, *_OPERATOR),
    "/sedac.control.v1.Rollouts/StartRollout": _OPERATOR,
    "/sedac.control.v1.Rollouts/GetRollout": _VIEWER,
    "/sedac.control.v1.Rollouts/ListRollouts": _VIEWER,
    "/sedac.control.v1.Rollouts/PromoteRollout": _OPERATOR,
    "/sedac.control.v1.Rollouts/PauseRollout": _OPERATOR,
    "/sedac.control.v1.Rollouts/ResumeRollout": _OPERATOR,
    "/sedac.control.v1.Rollouts/AbortRollout": _OPERATOR,
    "/sedac.control.v1.AuditLog/ListAuditEntries": _ADMIN,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _VIEWER,
}
"""The roles that may call a method."""
_MAX_AUTHOR_CHARS = 128
_HOW = "send a bearer token (SEDAC_CONTROL_TOKEN_FILE) or show a client certificate (SEDAC_CONTROL_CLIENT_CERT, _CLIENT_KEY)"


@dataclass(frozen=True, kw_only=True)
class Principal:
    """Somebody who proved who they are."""

    name: str
    kind: str
    """How they proved it: by `token` or by `certificate`."""
    entry: Entry | None = None
    """The line of the principals file; None: there is no such file, and every certificate of the authority may do everything."""

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who makes a change, as revisions and the audit log keep it."""

    principal: str
    """Who was authenticated, such as "token:alice"; "guard" or "rollout" where the service acts by itself; "-" where nobody is asked."""
    author: str
    """What the caller called itself; the principal's name where it said nothing, the peer where nobody is asked either."""
    peer: str


class Authenticator:
    """Finds the principal of a call, and whether it may make it."""

    def __init__(self, path: Path | None, *, certificates: bool, metrics: ControlMetrics) -> None:
        """Read the principals file, where there is one; `certificates` tells whether callers are asked for theirs.

        Raises:
            ConfigError: the file can't be used.
        """
        self._file = Reloading("principals", [path], lambda: read_principals(path, certificates=certificates), metrics) if path else None

    def refresh(self) -> None:
        """Read the file again where it changed."""
        if self._file:
            self._file.refresh()

    def admit(self, method: str, metadata: Sequence[tuple[str, Any]], evidence: Mapping[str, Sequence[bytes]]) -> Principal | None:
        """Return who calls `method`; None where nobody is asked. `evidence` is gRPC's authentication context.

        Raises:
            Unauthenticated: nobody proved who is calling.
            PermissionDenied: the principal's role may not call this method.
        """
        if self._file is None:
            names = _find_names(evidence)
            return Principal(name=names[0], kind="certificate") if names else None
        if method in OPEN:
            return None
        self.refresh()
        principal = self._authenticate(metadata, evidence)
        roles, role = RULES.get(method, ()), principal.entry.role if principal.entry else None
        if role not in roles:
            needed = f"needs role {' or '.join(roles)}" if roles else "is allowed to nobody"
            raise PermissionDenied(f"{principal} has role {role} and {method.rpartition('/')[2][:80]} {needed}; ask an administrator of this service")
        return principal

    def is_valid(self, principal: Principal) -> bool:
        """Whether what a principal showed still counts: its line is as it was, and has not expired."""
        return self._file is None or principal.entry is None or self._file.value.holds(principal.entry)

    def _authenticate(self, metadata: Sequence[tuple[str, Any]], evidence: Mapping[str, Sequence[bytes]]) -> Principal:
        assert self._file
        sent = [value for key, value in metadata if key == "authorization"]
        if sent:
            scheme, _, token = sent[0].partition(" ") if len(sent) == 1 and isinstance(sent[0], str) else ("", "", "")
            if scheme.lower() != "bearer" or not token:
                raise Unauthenticated("metadata authorization must be there once, as `Bearer TOKEN`")
            entry = self._file.value.find_token(token)
            if entry is None:
                raise Unauthenticated("this token is not known: it is wrong, expired or revoked; get a new one (`sedac control token` makes it)")
            return Principal(name=entry.name, kind="token", entry=entry)
        names = _find_names(evidence)
        found = self._file.value.find_certificate(names)
        if len({entry.name for entry in found}) > 1:
            raise Unauthenticated("the names of this certificate belong to several principals; issue one certificate for each")
        if found:
            return Principal(name=found[0].name, kind="certificate", entry=found[0])
        raise Unauthenticated(f"the names of this certificate belong to no principal, or it has expired; {_HOW}" if names else f"who calls? {_HOW}")


def _find_names(evidence: Mapping[str, Sequence[bytes]]) -> list[str]:
    """Return the names of the caller's certificate that principals may be named by, the common name first."""
    keys = ("x509_common_name", "peer_dns", "peer_uri")
    return [name.decode("utf-8", "replace") for key in keys for name in evidence.get(key, ()) if name]


_principal: contextvars.ContextVar[Principal | None] = contextvars.ContextVar("sedac_principal", default=None)


def set_principal(principal: Principal | None) -> None:
    """Note who makes the call that this task runs."""
    _principal.set(principal)


def get_principal() -> Principal | None:
    """Return who makes the running call; None where nobody is asked."""
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


def check_engine_id(engine_id: str) -> None:
    """Hold an engine to the one id that its principal is bound to.

    Raises:
        PermissionDenied: it is bound to another.
    """
    principal = get_principal()
    bound = principal.entry.engine_id if principal and principal.entry else ""
    if bound and bound != engine_id:
        _log.warning("refused Follow: %s is bound to engine %r and says that it is %r", principal, bound, engine_id[:128])
        raise PermissionDenied(f"{principal} may speak for engine {bound!r} alone, not for {engine_id[:128]!r}; set SEDAC_ENGINE_ID={bound}")
