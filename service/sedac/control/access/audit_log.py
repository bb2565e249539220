"""The audit log: every accepted change, who made it and what it changed, and the service by which administrators read it.

An entry is written in the transaction of the change that it tells of, so that there is none without the other: whoever changes
something appends inside `database.transaction()`. Nothing here alters or removes an entry.
"""

from __future__ import annotations

import asyncio
import datetime
import re
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf import json_format
from google.protobuf.message import Message

from sedac.contract.v1 import audit_log_pb2, audit_log_pb2_grpc
from sedac.control.access.auth import Caller
from sedac.control.base.database import Database
from sedac.control.base.status import answering, refuse
from sedac.control.policy.store import POLICY_NAME, Revision, Store
from sedac.policy.model import Policy

_COLUMNS = "number, time, principal, author, peer, action, resource, before_json, after_json, comment"
_DEFAULT_PAGE, _MAX_PAGE = 50, 1000
_MAX_PAGE_BYTES = 1 << 20  # of an answer; clients take 4 MiB unless told otherwise


class AuditLogStore:
    """The entries of one database; see the module's docstring."""

    def __init__(self, database: Database, *, now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC)) -> None:
        """Use an open database."""
        self._db, self._now = database, now

    def append(self, action: str, resource: str, before: Message | None, after: Message | None, comment: str = "", *, caller: Caller) -> None:
        """Write one entry, in the running transaction where there is one.

        `action` is the method ("UpdatePolicy"), `resource` what it changed ("policies/default", "probe-sets/NAME", "rollouts/7");
        `before` is None where there was nothing, `after` where it is gone.

        Raises:
            StoreFailed: nothing was stored, for want of space or a working disk.
        """
        values = (caller.principal, caller.author, caller.peer, action, resource, _to_json(before), _to_json(after), comment)
        with self._db.transaction():
            self._db.execute(f"INSERT INTO audit_log ({_COLUMNS}) VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (self._now().timestamp(), *values))

    def append_revision(self, store: Store, policy: Policy, *, action: str, caller: Caller, comment: str = "", **more: Any) -> Revision:
        """Store a revision of the policy and its entry as one act; `more` goes to `Store.append`, which says what it raises.

        A repeated request, which makes no revision, leaves no entry.
        """
        with self._db.transaction():
            before = store.find_newest()
            made = store.append(policy, author=caller.author, comment=comment, **more)
            if before is None or made.revision > before.revision:
                self.append(action, POLICY_NAME, before.to_proto() if before else None, made.to_proto(), comment, caller=caller)
            return made

    def list(self, *, before: int | None, limit: int) -> list[audit_log_pb2.AuditEntry]:
        """Return at most `limit` entries older than number `before` (None: from the newest), newest first; fewer where they are long."""
        newer = 1 << 62 if before is None else before
        found: list[audit_log_pb2.AuditEntry] = []
        num_bytes = 0
        with self._db.reading():
            for row in self._db.execute(f"SELECT {_COLUMNS} FROM audit_log WHERE number < ? ORDER BY number DESC LIMIT ?", (newer, limit)):
                entry = _to_entry(row)
                num_bytes += entry.ByteSize()
                if found and num_bytes > _MAX_PAGE_BYTES:
                    break
                found.append(entry)
        return found


class AuditLogServicer(audit_log_pb2_grpc.AuditLogServicer):
    """What administrators read."""

    def __init__(self, audit_log: AuditLogStore) -> None:
        self._audit_log = audit_log

    async def ListAuditEntries(  # noqa: N802
        self, request: audit_log_pb2.ListAuditEntriesRequest, context: grpc.aio.ServicerContext
    ) -> audit_log_pb2.ListAuditEntriesResponse:
        """Return one page, newest first; the token is the last number of the page before."""
        async with answering(context):
            if not 0 <= request.page_size <= _MAX_PAGE:
                raise refuse("page_size", f"{request.page_size} is outside 0..{_MAX_PAGE}")
            if not re.fullmatch("[0-9]{0,18}", request.page_token):
                raise refuse("page_token", f"{request.page_token[:40]!r} was not made by this service; start again without one")
            before = int(request.page_token) if request.page_token else None
            entries = await asyncio.to_thread(self._audit_log.list, before=before, limit=request.page_size or _DEFAULT_PAGE)
            token = str(entries[-1].number) if entries and entries[-1].number > 1 else ""
            return audit_log_pb2.ListAuditEntriesResponse(entries=entries, next_page_token=token)
        raise AssertionError("unreachable: answering() ends the call")


def _to_json(message: Message | None) -> str:
    return "" if message is None else str(json_format.MessageToJson(message, preserving_proto_field_name=True, indent=None))


def _to_entry(row: tuple[int, float, str, str, str, str, str, str, str, str]) -> audit_log_pb2.AuditEntry:
    number, time, principal, author, peer, action, resource, before_json, after_json, comment = row
    entry = audit_log_pb2.AuditEntry(
        number=number,
        principal=principal,
        author=author,
        peer=peer,
        action=action,
        resource=resource,
        before_json=before_json,
        after_json=after_json,
        comment=comment,
    )
    entry.time.FromDatetime(datetime.datetime.fromtimestamp(time, datetime.UTC))
    return entry
