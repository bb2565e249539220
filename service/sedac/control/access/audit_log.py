"""The audit log: every accepted change, who made it and what it changed, and the service by which administrators read it.

An entry is written in the transaction of the change that it tells of, so that there is none without the other: whoever changes
something appends inside `database.transaction()`. Nothing here alters or removes an entry.
"""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Callable

import grpc
from google.protobuf import json_format
from google.protobuf.message import Message

from sedac.contract.v1 import audit_log_pb2, audit_log_pb2_grpc
from sedac.control.access.auth import Caller
from sedac.control.base.database import Database
from sedac.control.base.pages import MAX_PAGE_BYTES, get_limit, read_number
from sedac.control.base.status import answering

_COLUMNS = "number, time, principal, author, peer, action, resource, before_json, after_json, comment"


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

    def list(self, *, before: int | None, limit: int) -> list[audit_log_pb2.AuditEntry]:
        """Return at most `limit` entries older than number `before` (None: from the newest), newest first; fewer where they are long."""
        newer = 1 << 62 if before is None else before
        found: list[audit_log_pb2.AuditEntry] = []
        num_bytes = 0
        with self._db.reading():
            for row in self._db.execute(f"SELECT {_COLUMNS} FROM audit_log WHERE number < ? ORDER BY number DESC LIMIT ?", (newer, limit)):
                entry = _to_entry(row)
                num_bytes += entry.ByteSize()
                if found and num_bytes > MAX_PAGE_BYTES:
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
            limit, before = get_limit(request.page_size), read_number(request.page_token)
            entries = await asyncio.to_thread(self._audit_log.list, before=before, limit=limit)
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
