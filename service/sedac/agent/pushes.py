"""What the control service pushes: read, and made ready to be applied, so that the switch itself takes no longer than a step.

The bytes may be anybody's: what can't be is refused with the field at fault, and nothing is left half done.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import grpc

from sedac.agent.engine import AttachedEngine
from sedac.agent.fetch import FetchedSet, fetch
from sedac.contract import wire
from sedac.contract.credentials import Credentials
from sedac.contract.unknown_fields import check_known
from sedac.contract.v1 import control_pb2
from sedac.errors import FieldViolation, PolicyInvalid
from sedac.policy.check import validate
from sedac.policy.layout import Layout, ProbeSetSummary
from sedac.policy.model import Candidate, Policy
from sedac.settings import EngineSettings

_log = logging.getLogger(__name__)
_MAX_PUSH_BYTES = 2**18  # the largest policy that is valid takes a tenth of it
_PRELOAD_SECONDS = 120.0
_LOOK_SECONDS = 0.05
_NUM_TRIES = 3


_T = TypeVar("_T")
Fetch = Callable[[control_pb2.ProbeSetReference], Awaitable[FetchedSet]]


@dataclass(frozen=True, kw_only=True)
class Orders:
    """One push, read."""

    policy: Policy
    revision: int
    candidate: Candidate | None = None
    references: dict[str, control_pb2.ProbeSetReference] = field(default_factory=dict)
    """The probe sets that the control service has, by name."""


def read_push(push: control_pb2.PolicyPush) -> Orders:
    """Read a push and check all that needs neither the model nor a probe set.

    Raises:
        PolicyInvalid: with the fields at fault; those of the candidate begin with `candidate`. Fields that this version does not know
            are refused too, because the policy would be in force without them.
    """
    if push.ByteSize() > _MAX_PUSH_BYTES:
        raise PolicyInvalid([FieldViolation("policy", f"the push has {push.ByteSize()} bytes, at most {_MAX_PUSH_BYTES} are read")])
    if push.policy.revision <= 0:
        raise PolicyInvalid([FieldViolation("policy.revision", f"{push.policy.revision} is no revision; they count from 1")])
    check_known(push.policy, "engine")
    check_known(push.candidate, "engine", "candidate.")
    policy = wire.policy_from_proto(push.policy)
    candidate = wire.candidate_from_proto(push.candidate) if push.HasField("candidate") else None
    _validate_both(policy, candidate)
    return Orders(policy=policy, revision=push.policy.revision, candidate=candidate, references={r.name: r for r in push.probe_sets})


def _validate_both(policy: Policy, candidate: Candidate | None, layout: Layout | None = None, sets: dict[str, ProbeSetSummary] | None = None) -> None:
    bad: list[FieldViolation] = []
    for prefix, found in (("", policy), ("candidate.policy.", candidate.policy if candidate else None)):
        if found is not None:
            try:
                validate(found, layout, sets or {})
            except PolicyInvalid as error:
                bad += [FieldViolation(prefix + v.field, v.description) for v in error.violations]
    if bad:
        raise PolicyInvalid(bad)


@dataclass(kw_only=True)
class Preparation:
    """Makes ready what orders need: probe sets fetched, verified and preloaded in every worker.

    What the orders in force name is in the workers already, so that most changes cost no more than the switch itself.
    """

    engine: AttachedEngine
    _in_force: dict[str, FetchedSet] = field(default_factory=dict)
    """Probe sets that the orders in force name, by digest."""
    _made_ready: dict[str, FetchedSet] = field(default_factory=dict)

    def note_applied(self) -> None:
        """What was made ready last is in force now; workers forget the others."""
        self._in_force = self._made_ready

    def forget(self) -> None:
        """Nobody knows what the workers have; make everything ready again next time."""
        self._in_force = {}

    async def prepare(self, orders: Orders, layout: Layout, fetch: Fetch) -> None:
        """Fetch and preload what the policies name beside the attached set, and check both policies against the model with these sets.

        Raises:
            PolicyInvalid: with the fields at fault.
        """
        fetched: dict[str, FetchedSet] = {}
        for field_name, name in _list_names(orders, layout):
            reference = orders.references.get(name)
            if name not in fetched and reference is not None:
                in_force = self._in_force.get(reference.sha256)
                fetched[name] = in_force if in_force is not None else await self._try(field_name, name, self._fetch(reference, fetch))
        _validate_both(orders.policy, orders.candidate, layout, {name: found.summary for name, found in fetched.items()})
        for field_name, name in _list_names(orders, layout):
            if name in fetched and fetched[name].summary.sha256 not in self._in_force:
                await self._try(field_name, name, self._preload(fetched[name]))
        self._made_ready = {found.summary.sha256: found for found in fetched.values()}

    async def _try(self, field_name: str, name: str, work: Awaitable[_T]) -> _T:
        try:
            return await work
        except PolicyInvalid:
            raise
        except Exception as error:
            told = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error) or type(error).__name__
            _log.warning("probe set %r is not ready: %r", name, error)
            raise PolicyInvalid([FieldViolation(field_name, f"{name!r} can't be made ready: {told}")]) from error

    async def _fetch(self, reference: control_pb2.ProbeSetReference, fetch: Fetch) -> FetchedSet:
        for again in range(1, _NUM_TRIES):
            try:
                return await fetch(reference)
            except (grpc.aio.AioRpcError, ConnectionError, TimeoutError) as error:
                _log.warning("fetching probe set %r failed (%r); trying again", reference.name, error)
                await asyncio.sleep(0.2 * 2**again)
        return await fetch(reference)

    async def _preload(self, found: FetchedSet) -> None:
        digest = found.summary.sha256
        async with asyncio.timeout(_PRELOAD_SECONDS):
            if not await self.engine.has(digest):
                await self.engine.preload(str(found.directory), digest)
            while not await self.engine.is_preloaded(digest):  # noqa: ASYNC110  the workers announce nothing
                await asyncio.sleep(_LOOK_SECONDS)


def _list_names(orders: Orders, layout: Layout) -> list[tuple[str, str]]:
    """Return the sets to load by the field that names them; the attached one is there, unless the service means another by its name."""
    named = [("probe_set", orders.policy.probe_set), ("candidate.policy.probe_set", orders.candidate.policy.probe_set if orders.candidate else "")]
    stated = orders.references.get(layout.probe_set)
    attached = {"", layout.probe_set} if stated is None or stated.sha256 == layout.probe_set_sha256 else {""}
    return [(field_name, name) for field_name, name in named if name not in attached]


class ProbeSetSource:
    """The control service's probe sets, fetched into one cache."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._cache: Path | None = None

    def open(self, channel: grpc.aio.Channel, credentials: Credentials) -> Fetch:
        """Return what fetches over one connection."""

        async def fetch_one(reference: control_pb2.ProbeSetReference) -> FetchedSet:
            """Fetch one probe set into the cache."""
            if self._cache is None:
                self._cache = await asyncio.to_thread(find_probe_cache, self._settings)
            return await fetch(channel, reference, self._cache, metadata=credentials.make_call_metadata())

        return fetch_one


def find_probe_cache(settings: EngineSettings) -> Path:
    """Return the directory for fetched probe sets, made where it can be: the one set, the user's cache, or a temporary one.

    Raises:
        OSError: the directory that was set can't be made.
    """
    if settings.probe_cache is not None:
        settings.probe_cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        return settings.probe_cache
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sedac" / "probe-sets"
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(home, os.W_OK):
            return home
    except OSError as error:
        _log.info("%s can't be used (%s); fetched probe sets lie in a temporary directory", home, error.strerror)
    return Path(tempfile.mkdtemp(prefix="sedac-probe-sets-"))
