"""The watching half of the gRPC service of operators: what is followed rather than changed, and the engines.

A watcher is sent what is true when it is ready for more, so a slow one costs nobody anything: of states it misses the ones in
between, of revisions none, because those are read from the store.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc

from sedac.contract.v1 import control_pb2, control_pb2_grpc
from sedac.control.base.pages import get_limit
from sedac.control.base.status import answering, refuse
from sedac.control.fleet.fleet import Fleet
from sedac.control.revisions.store import Store, check_name
from sedac.errors import ControlUnavailable

_BATCH_REVISIONS = 100
_SETTLE_SECONDS = 0.05
"""Changes within this time are sent as one, so that a fleet that answers one revision wakes nobody once per engine."""
_FORGET_SECONDS = 60.0


class WatchServicer(control_pb2_grpc.ControlServicer):
    """What operators follow."""

    def __init__(self, store: Store, fleet: Fleet) -> None:
        self._store, self._fleet = store, fleet

    async def WatchPolicy(  # noqa: N802
        self, request: control_pb2.WatchPolicyRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[control_pb2.Policy]:
        """Send every revision from the one asked for, in order and without a gap, then each new one once it is announced."""
        async with answering(context):
            check_name(request.name)
            wanted = self._find_first(request.from_revision)
            while True:
                await self._fleet.wait_for_revision(wanted)
                if self._fleet.closing:
                    raise ControlUnavailable(f"the control service is stopping; watch again from revision {wanted} when it is back")
                assert self._fleet.desired is not None, "a revision was waited for"
                limit = min(self._fleet.desired.revision - wanted + 1, _BATCH_REVISIONS)  # stored is not yet announced
                for revision in await asyncio.to_thread(self._store.read, wanted, limit=limit):
                    yield revision.to_proto()
                    wanted = revision.revision + 1

    def _find_first(self, asked: int) -> int:
        newest = self._fleet.desired.revision if self._fleet.desired else 0
        if not 0 <= asked <= newest + 1:
            remedy = f"watch from {newest + 1} for the next one, or from 0 for the one in force and what follows"
            raise refuse("from_revision", f"{asked} is outside 0..{newest + 1}, the newest revision is {newest or 'none yet'}: {remedy}")
        return asked or max(newest, 1)

    async def WatchStatus(  # noqa: N802
        self, request: control_pb2.WatchStatusRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[control_pb2.Status]:
        """Send the status now, on every change of the policy or of an engine's state, and at least once per interval.

        Counters alone are no change: they come with the interval.
        """
        async with answering(context):
            interval = request.interval_seconds or 1.0
            if not 0.1 <= interval <= 60:
                raise refuse("interval_seconds", f"{interval} is outside 0.1..60")
            seen = -1
            while True:
                seen = await self._wait(seen, interval)
                yield self._fleet.to_status()
                await asyncio.sleep(_SETTLE_SECONDS)

    async def ListEngines(  # noqa: N802
        self, request: control_pb2.ListEnginesRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.ListEnginesResponse:
        """Return one page, by id; the token is the last id of the page before."""
        async with answering(context):
            limit = get_limit(request.page_size)
            page = [engine for engine in self._fleet.list_engines() if engine.id > request.page_token][: limit + 1]
            token = page[limit - 1].id if len(page) > limit else ""
            return control_pb2.ListEnginesResponse(engines=map(self._fleet.describe, page[:limit]), next_page_token=token)
        raise AssertionError("unreachable: answering() ends the call")

    async def WatchEngines(  # noqa: N802
        self, request: control_pb2.WatchEnginesRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[control_pb2.WatchEnginesResponse]:
        """Send every engine now, also where there is none, then those whose state changes and the ids of those forgotten."""
        async with answering(context):
            known: set[str] | None = None
            seen = -1
            while True:
                before, seen = seen, await self._wait(seen, _FORGET_SECONDS)
                engines = self._fleet.list_engines()
                changed = [self._fleet.describe(engine) for engine in engines if engine.version > before]
                ids = {engine.id for engine in engines}
                forgotten = sorted(known - ids) if known else []
                if changed or forgotten or known is None:
                    yield control_pb2.WatchEnginesResponse(engines=changed, forgotten_engine_ids=forgotten)
                    await asyncio.sleep(_SETTLE_SECONDS)
                known = ids

    async def _wait(self, seen: int, timeout_seconds: float) -> int:
        version = await self._fleet.wait(seen, timeout_seconds)
        if self._fleet.closing:
            raise ControlUnavailable("the control service is stopping; watch again when it is back")
        return version
