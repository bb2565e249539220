"""The gRPC service of operators: read, change and roll back the policy; watching is in watches.py.

Every change is validated, stored, then announced to the fleet, in this order and one at a time. It never talks to an engine.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from sedac.contract import wire
from sedac.contract.unknown_fields import check_known
from sedac.contract.v1 import control_pb2
from sedac.control.access.auth import Caller, get_caller
from sedac.control.base.metrics import ControlMetrics
from sedac.control.base.pages import get_limit, read_number
from sedac.control.base.status import answering, refuse
from sedac.control.fleet.fleet import Fleet
from sedac.control.policy.watches import WatchServicer
from sedac.control.revisions.store import POLICY_NAME, Revision, Store, check_name
from sedac.control.rollout.changes import Changes
from sedac.errors import RevisionNotFound, SedacError, StaleEtag
from sedac.policy.digest import get_knobs_digest
from sedac.policy.knob import list_fields
from sedac.policy.model import Policy

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_FIELDS = tuple(f.name for f in dataclasses.fields(Policy))
_PARTS = {f.name: f.type for f in list_fields(Policy) if f.is_part and not f.is_list and f.default is not None}
"""The fields of the policy whose own fields a mask may name: what is there always and once. A certificate is set whole."""
_PART_FIELDS = tuple(f"{name}.{f.name}" for name, kind in _PARTS.items() for f in dataclasses.fields(kind))
_MAX_CHARS = {"comment": 1024, "request_id": 128, "probe_set": 256}


class ControlServicer(WatchServicer):
    """What operators call."""

    def __init__(self, store: Store, fleet: Fleet, metrics: ControlMetrics, in_force: Changes) -> None:
        super().__init__(store, fleet)
        self._metrics, self._in_force = metrics, in_force
        self._changes: set[asyncio.Task[control_pb2.Policy]] = set()

    async def GetPolicy(self, request: control_pb2.GetPolicyRequest, context: grpc.aio.ServicerContext) -> control_pb2.Policy:  # noqa: N802
        """Return the revision asked for, or the one in force."""
        async with answering(context):
            check_name(request.name)
            if request.revision:
                return (await asyncio.to_thread(self._store.get, request.revision)).to_proto()
            if self._fleet.desired is None:
                raise RevisionNotFound(
                    "no policy yet: no engine has connected; start one, or set the first policy with UpdatePolicy (`sedac ctl policy apply FILE`)"
                )
            return self._fleet.desired.to_proto()
        raise AssertionError("unreachable: answering() ends the call")

    async def UpdatePolicy(self, request: control_pb2.UpdatePolicyRequest, context: grpc.aio.ServicerContext) -> control_pb2.Policy:  # noqa: N802
        """Validate, store and push a change; see the contract.

        The comment belongs to the revision, so it is taken as sent, whatever the mask says.
        """
        async with answering(context):
            return await self._finish(self._update(request, get_caller(context)), counted=not request.validate_only)
        raise AssertionError("unreachable: answering() ends the call")

    async def RollbackPolicy(self, request: control_pb2.RollbackPolicyRequest, context: grpc.aio.ServicerContext) -> control_pb2.Policy:  # noqa: N802
        """Store the content of an older revision as the newest one."""
        async with answering(context):
            return await self._finish(self._roll_back(request, get_caller(context)), counted=True)
        raise AssertionError("unreachable: answering() ends the call")

    async def ListPolicyRevisions(  # noqa: N802
        self, request: control_pb2.ListPolicyRevisionsRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.ListPolicyRevisionsResponse:
        """Return one page, newest first; the token is the last revision of the page before."""
        async with answering(context):
            check_name(request.name)
            limit = get_limit(request.page_size)
            before = read_number(request.page_token)
            page = await asyncio.to_thread(self._store.list, before=before, limit=limit + 1)
            token = str(page[limit - 1].revision) if len(page) > limit else ""
            return control_pb2.ListPolicyRevisionsResponse(policies=[r.to_proto() for r in page[:limit]], next_page_token=token)
        raise AssertionError("unreachable: answering() ends the call")

    async def GetStatus(self, request: control_pb2.GetStatusRequest, context: grpc.aio.ServicerContext) -> control_pb2.Status:  # noqa: N802
        """Return the desired policy and every engine's state."""
        return self._fleet.to_status()

    async def _update(self, request: control_pb2.UpdatePolicyRequest, caller: Caller) -> control_pb2.Policy:
        sent = request.policy
        check_name(sent.name)
        if not request.HasField("policy"):
            raise refuse("policy", "is missing; send the fields to set")
        check_known(sent, "control service")
        _check_lengths(comment=sent.comment, request_id=request.request_id, probe_set=sent.probe_set)

        def make(newest: Revision | None) -> Policy:
            """Return the newest policy with the request's fields."""
            return _merge(newest.policy if newest else Policy(), request)

        if not request.validate_only:
            return await self._change(make, "UpdatePolicy", caller, sent.comment, sent.etag, request.request_id, request)
        newest = self._fleet.desired
        if sent.etag and (newest is None or newest.etag != sent.etag):
            raise StaleEtag(f"etag {sent.etag[:40]!r} is not the one in force ({newest.etag if newest else ''!r}); read the policy again and retry")
        policy = make(newest)
        self._in_force.check(policy)
        return wire.policy_to_proto(policy, name=POLICY_NAME, etag=newest.etag if newest else "", revision=newest.revision if newest else 0)

    async def _roll_back(self, request: control_pb2.RollbackPolicyRequest, caller: Caller) -> control_pb2.Policy:
        check_name(request.name)
        _check_lengths(comment=request.comment, request_id=request.request_id)

        def make(_: Revision | None) -> Policy:
            """Return the policy of the revision that was asked for."""
            return self._store.get(request.revision).policy

        comment = request.comment or f"rollback to revision {request.revision}"
        return await self._change(make, "RollbackPolicy", caller, comment, request.etag, request.request_id, request)

    async def _change(
        self, make: Callable[[Revision | None], Policy], action: str, caller: Caller, comment: str, etag: str, request_id: str, request: Message
    ) -> control_pb2.Policy:
        fingerprint = hashlib.sha256(type(request).__name__.encode() + request.SerializeToString(deterministic=True)).hexdigest()
        async with self._in_force.lock:
            if request_id:  # before anything is checked: what was right the first time may be stale by now
                done = await asyncio.to_thread(self._store.find_request, request_id, fingerprint)
                if done:
                    return done.to_proto()
            before = self._fleet.desired
            policy = await asyncio.to_thread(make, before)
            self._in_force.check(policy)
            made = await self._in_force.append(
                policy,
                action=action,
                caller=caller,
                comment=comment,
                expected_etag=etag,
                first=before is None,
                request_id=request_id,
                fingerprint=fingerprint,
            )
            dropped = before.policy.certificate if before and not policy.certificate else None
        _log.info("policy revision %d by %s%s", made.revision, made.author, f": {made.comment}" if made.comment else "")
        if dropped:
            _log.warning("policy revision %d is UNCERTIFIED: it leaves out the certificate of the one before (%s)", made.revision, dropped.describe())
        return made.to_proto()

    async def _finish(self, change: Coroutine[Any, Any, control_pb2.Policy], *, counted: bool) -> control_pb2.Policy:
        """Run a change to its end even when its caller has gone: what is stored must be announced too."""
        task = asyncio.create_task(self._count(change) if counted else change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        return await asyncio.shield(task)

    async def _count(self, change: Coroutine[Any, Any, control_pb2.Policy]) -> control_pb2.Policy:
        try:
            made = await change
        except SedacError:
            self._metrics.changes.labels("refused").inc()
            raise
        self._metrics.changes.labels("accepted").inc()
        return made


def _merge(current: Policy, request: control_pb2.UpdatePolicyRequest) -> Policy:
    paths = list(request.update_mask.paths)
    sent = wire.policy_from_proto(request.policy)
    if not paths or paths == ["*"]:
        return sent
    unknown = [path for path in paths if path not in (*_FIELDS, *_PART_FIELDS, "comment")]
    if unknown:
        names = ", ".join(_FIELDS)
        raise refuse("update_mask", f"{unknown[0][:80]!r} can't be set; fields: {names}, comment; also single ones of parts, as audit.share")
    changes = {path: getattr(sent, path) for path in paths if path in _FIELDS}
    for name in _PARTS:
        parts = {path.partition(".")[2] for path in paths if path in _PART_FIELDS and path.startswith(f"{name}.")}
        if parts and name not in changes:
            changes[name] = dataclasses.replace(getattr(current, name), **{part: getattr(getattr(sent, name), part) for part in parts})
    merged = dataclasses.replace(current, **changes)
    return merged if "certificate" in changes or _is_certified(merged) else dataclasses.replace(merged, certificate=None)


def _is_certified(policy: Policy) -> bool:
    """Whether a policy's certificate is for its own knobs."""
    certificate = policy.certificate
    if certificate is None or certificate.tier not in {tier.name for tier in policy.get_tiers()}:
        return False
    return get_knobs_digest(policy, certificate.tier) == certificate.knobs_sha256


def _check_lengths(**texts: str) -> None:
    for field, text in texts.items():
        if len(text) > _MAX_CHARS[field]:
            raise refuse(field, f"{len(text)} characters; at most {_MAX_CHARS[field]}")
