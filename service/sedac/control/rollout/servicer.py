"""The gRPC service of roll-outs: start, look, promote, pause, resume, abort."""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import grpc

from sedac.contract import wire
from sedac.contract.unknown_fields import check_known
from sedac.contract.v1 import rollouts_pb2, rollouts_pb2_grpc
from sedac.control.access.auth import Caller, get_caller
from sedac.control.base.pages import MAX_PAGE_BYTES, get_limit, read_number
from sedac.control.base.status import answering, refuse
from sedac.control.fleet.fleet import Fleet
from sedac.control.fleet.pooling import pool
from sedac.control.revisions.store import Store, check_name
from sedac.control.rollout.bounds import Bounds
from sedac.control.rollout.changes import Changes
from sedac.control.rollout.driver import RolloutDriver, get_baseline
from sedac.control.rollout.rollout import Rollout
from sedac.control.rollout.store import RolloutStore
from sedac.errors import FieldViolation, PolicyInvalid, RolloutConflict, RolloutNotFound
from sedac.policy.model import Policy

_SHARES = (0.05, 0.25, 0.5)
_INTERVAL_SECONDS, _MIN_REQUESTS = 60.0, 100
_MAX_STEPS, _MAX_CHARS, _MAX_ID_CHARS = 32, 1024, 128
_NAME = re.compile("rollouts/([1-9][0-9]{0,17})")
_Change = Callable[[Rollout, rollouts_pb2.ChangeRolloutRequest, Caller], Coroutine[Any, Any, Rollout]]


class RolloutServicer(rollouts_pb2_grpc.RolloutsServicer):
    """What operators call."""

    def __init__(self, store: Store, rollouts: RolloutStore, changes: Changes, fleet: Fleet, driver: RolloutDriver) -> None:
        self._store, self._rollouts, self._changes, self._fleet, self._driver = store, rollouts, changes, fleet, driver
        self._running: set[asyncio.Task[Rollout]] = set()

    async def StartRollout(self, request: rollouts_pb2.StartRolloutRequest, context: grpc.aio.ServicerContext) -> rollouts_pb2.Rollout:  # noqa: N802
        """Check and store a roll-out, then push its candidate at its first share."""
        async with answering(context):
            return (await self._finish(self._start(request, get_caller(context)))).to_proto()
        raise AssertionError("unreachable: answering() ends the call")

    async def GetRollout(self, request: rollouts_pb2.GetRolloutRequest, context: grpc.aio.ServicerContext) -> rollouts_pb2.Rollout:  # noqa: N802
        """Return one; without a name the one under way, or the newest."""
        async with answering(context):
            return (await asyncio.to_thread(self._find, request.name)).to_proto()
        raise AssertionError("unreachable: answering() ends the call")

    async def ListRollouts(self, request: rollouts_pb2.ListRolloutsRequest, context: grpc.aio.ServicerContext) -> rollouts_pb2.ListRolloutsResponse:  # noqa: N802
        """Return one page, newest first; the token is the last number of the page before."""
        async with answering(context):
            limit, before = get_limit(request.page_size), read_number(request.page_token)
            found = await asyncio.to_thread(self._rollouts.list, before=before, limit=limit)
            page: list[rollouts_pb2.Rollout] = []
            num_bytes = 0
            for rollout in found:
                page.append(rollout.to_proto())
                num_bytes += page[-1].ByteSize()
                if num_bytes > MAX_PAGE_BYTES:
                    break
            token = str(page[-1].number) if page and page[-1].number > 1 else ""
            return rollouts_pb2.ListRolloutsResponse(rollouts=page, next_page_token=token)
        raise AssertionError("unreachable: answering() ends the call")

    async def PromoteRollout(self, request: rollouts_pb2.ChangeRolloutRequest, context: grpc.aio.ServicerContext) -> rollouts_pb2.Rollout:  # noqa: N802
        """Make the candidate the policy in force, whatever the analysis says."""
        return await self._change(request, context, self._promote)

    async def PauseRollout(self, request: rollouts_pb2.ChangeRolloutRequest, context: grpc.aio.ServicerContext) -> rollouts_pb2.Rollout:  # noqa: N802
        """Keep the share and stop the analysis."""

        async def pause(rollout: Rollout, request: rollouts_pb2.ChangeRolloutRequest, caller: Caller) -> Rollout:
            """Pause the roll-out, and store that."""
            after = rollout.pause(_tell("paused", request, caller))
            return await self._changes.change_rollout(rollout, after, "PauseRollout", caller, request.comment)

        return await self._change(request, context, pause)

    async def ResumeRollout(self, request: rollouts_pb2.ChangeRolloutRequest, context: grpc.aio.ServicerContext) -> rollouts_pb2.Rollout:  # noqa: N802
        """Go on from the same share with a new interval."""

        async def resume(rollout: Rollout, request: rollouts_pb2.ChangeRolloutRequest, caller: Caller) -> Rollout:
            """Resume the roll-out, and store that."""
            after = rollout.resume(_tell("resumed", request, caller), self._driver.list_engines())
            return await self._changes.change_rollout(rollout, after, "ResumeRollout", caller, request.comment)

        return await self._change(request, context, resume)

    async def AbortRollout(self, request: rollouts_pb2.ChangeRolloutRequest, context: grpc.aio.ServicerContext) -> rollouts_pb2.Rollout:  # noqa: N802
        """Give all requests back to the policy in force."""

        async def abort(rollout: Rollout, request: rollouts_pb2.ChangeRolloutRequest, caller: Caller) -> Rollout:
            """End the roll-out, and store that."""
            after = rollout.end("aborted", _tell("aborted", request, caller))
            return await self._changes.change_rollout(rollout, after, "AbortRollout", caller, request.comment)

        return await self._change(request, context, abort)

    async def _start(self, request: rollouts_pb2.StartRolloutRequest, caller: Caller) -> Rollout:
        fingerprint = hashlib.sha256(request.SerializeToString(deterministic=True)).hexdigest()
        _check_length("comment", request.comment, _MAX_CHARS)
        _check_length("request_id", request.request_id, _MAX_ID_CHARS)
        async with self._changes.lock:
            if request.request_id:  # before anything is checked: what was right the first time may be wrong by now
                done = await asyncio.to_thread(self._rollouts.find_request, request.request_id, fingerprint)
                if done:
                    return done
            policy = await self._read_candidate(request)
            terms = _read_terms(request, policy)
            self._check(policy)
            desired = self._fleet.desired
            if desired is None:
                raise RolloutConflict("no policy is in force yet, so there is nothing to run beside; start an engine or set the first policy")
            return await self._changes.start_rollout(
                caller,
                request.comment,
                policy=policy,
                base_revision=desired.revision,
                engines=self._driver.list_engines(),
                baseline=get_baseline(await asyncio.to_thread(pool, self._fleet.book.list())),
                request_id=request.request_id,
                fingerprint=fingerprint,
                **terms,
            )

    async def _read_candidate(self, request: rollouts_pb2.StartRolloutRequest) -> Policy:
        if request.HasField("policy") == bool(request.revision):
            raise refuse("policy", "give the whole candidate, or leave it out and give the revision that holds it; one of both")
        if request.revision:
            return (await asyncio.to_thread(self._store.get, request.revision)).policy
        check_name(request.policy.name)
        check_known(request.policy, "control service")
        return wire.policy_from_proto(request.policy)

    def _check(self, policy: Policy) -> None:
        try:
            self._changes.check(policy)
        except PolicyInvalid as error:
            raise PolicyInvalid([FieldViolation(f"policy.{v.field}", v.description) for v in error.violations]) from None

    async def _change(self, request: rollouts_pb2.ChangeRolloutRequest, context: grpc.aio.ServicerContext, change: _Change) -> rollouts_pb2.Rollout:
        async with answering(context):
            _check_length("comment", request.comment, _MAX_CHARS)
            return (await self._finish(self._change_locked(request, get_caller(context), change))).to_proto()
        raise AssertionError("unreachable: answering() ends the call")

    async def _change_locked(self, request: rollouts_pb2.ChangeRolloutRequest, caller: Caller, change: _Change) -> Rollout:
        async with self._changes.lock:
            rollout = await asyncio.to_thread(self._find, request.name)
            rollout.check_etag(request.etag)
            if not rollout.is_under_way:
                raise RolloutConflict(f"{rollout.name} is {rollout.state} ({rollout.reason}); no roll-out is under way: start one")
            return await change(rollout, request, caller)

    async def _promote(self, rollout: Rollout, request: rollouts_pb2.ChangeRolloutRequest, caller: Caller) -> Rollout:
        self._check(rollout.policy)
        comment, promoted = request.comment or f"promoted from {rollout.name}", replace(rollout, reason=_tell("promoted", request, caller))
        await self._changes.append(rollout.policy, action="PromoteRollout", caller=caller, comment=comment, promoted=promoted)
        return await asyncio.to_thread(self._rollouts.get, rollout.number)

    def _find(self, name: str) -> Rollout:
        if name:
            number = _NAME.fullmatch(name)
            if not number:
                raise RolloutNotFound(f"{name[:40]!r} is no roll-out; names are as rollouts/7: list them first")
            return self._rollouts.get(int(number[1]))
        newest = self._rollouts.find_newest()
        if newest is None:
            raise RolloutNotFound("no roll-out yet; start one with StartRollout (`sedac ctl rollout start`)")
        return newest

    async def _finish(self, change: Coroutine[Any, Any, Rollout]) -> Rollout:
        """Run a change to its end even when its caller has gone: what is stored must be announced too."""
        task = asyncio.create_task(change)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)


def _read_terms(request: rollouts_pb2.StartRolloutRequest, policy: Policy) -> dict[str, Any]:
    """Read shares, interval, minimum and bounds.

    Raises:
        PolicyInvalid: with every field at fault.
    """
    bad: list[FieldViolation] = []
    shares = tuple(request.shares) or _SHARES
    if len(shares) > _MAX_STEPS:
        bad.append(FieldViolation("shares", f"{len(shares)} steps; at most {_MAX_STEPS}"))
    last = 0.0
    for i, share in enumerate(shares[:_MAX_STEPS]):
        if not 0 < share <= 1:
            bad.append(FieldViolation(f"shares[{i}]", f"{share} is outside (0, 1]; 0.05 is one request in twenty"))
        elif share <= last:
            bad.append(FieldViolation(f"shares[{i}]", f"{share} follows {last}; give them ascending"))
        last = share
    interval = request.interval_seconds if request.HasField("interval_seconds") else _INTERVAL_SECONDS
    if not 0.1 <= interval <= 86400:
        bad.append(FieldViolation("interval_seconds", f"{interval} is outside 0.1..86400"))
    least = request.min_requests if request.HasField("min_requests") else _MIN_REQUESTS
    if not 1 <= least <= 1_000_000:
        bad.append(FieldViolation("min_requests", f"{least} is outside 1..1000000"))
    bounds = Bounds(**{field.name: value for field, value in request.bounds.ListFields()})
    bad += _find_bad_bounds(bounds, policy)
    if bad:
        raise PolicyInvalid(bad)
    return {"shares": shares, "interval_seconds": interval, "min_requests": least, "bounds": bounds}


def _find_bad_bounds(bounds: Bounds, policy: Policy) -> list[FieldViolation]:
    bad: list[FieldViolation] = []
    for name in ("max_mismatch", "max_nll_difference", "max_error_share"):
        bound = getattr(bounds, name)
        if bound is not None and not 0 <= bound <= 1:
            bad.append(FieldViolation(f"bounds.{name}", f"{bound} is outside 0..1; leave it out to ask for nothing"))
        elif bound is not None and name != "max_error_share" and policy.audit.share == 0:
            why = f"{bound} can't be held against anything while the candidate's audit.share is 0"
            bad.append(FieldViolation(f"bounds.{name}", f"{why}; audit a share of its requests, such as 0.1"))
    ratio = bounds.max_latency_ratio
    if ratio is not None and not (math.isfinite(ratio) and ratio > 0):
        bad.append(FieldViolation("bounds.max_latency_ratio", f"{ratio} is not a finite number over 0; 1.1 allows a tenth more"))
    if not 0.5 <= bounds.confidence < 1:
        bad.append(FieldViolation("bounds.confidence", f"{bounds.confidence} is outside 0.5 to below 1; 0.95 is usual"))
    return bad


def _check_length(field: str, text: str, limit: int) -> None:
    if len(text) > limit:
        raise refuse(field, f"{len(text)} characters; at most {limit}")


def _tell(what: str, request: rollouts_pb2.ChangeRolloutRequest, caller: Caller) -> str:
    return f"{what} by {caller.author}" + (f": {request.comment}" if request.comment else "")
