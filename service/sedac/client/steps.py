"""What takes several calls, told once for both clients: a generator of calls, pauses and items, which a client carries out in its own way.

steps = wait_until_synced(7, 5.0)
next(steps)                 a Call: send its answer back
steps.send(status)          a Pause: wait, then send None
steps.send(None)            an Item: what the caller gets
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sedac.client import requests
from sedac.client.diff import Change, find_policy_changes
from sedac.client.requests import Call
from sedac.contract import wire
from sedac.contract.v1 import audit_log_pb2, control_pb2, probe_sets_pb2, rollouts_pb2
from sedac.errors import NotSynced
from sedac.policy.model import Policy

_T = TypeVar("_T")
_MIN_POLL_SECONDS, _MAX_POLL_SECONDS = 0.05, 0.5
ENDED = frozenset({rollouts_pb2.ROLLOUT_STATE_PROMOTED, rollouts_pb2.ROLLOUT_STATE_ABORTED})
"""States of a roll-out that is over."""


@dataclass(frozen=True)
class Pause:
    """Wait before the next step."""

    seconds: float


@dataclass(frozen=True)
class Item(Generic[_T]):
    """Something that the caller asked for."""

    value: _T


Steps = Generator[Call[Any] | Pause | Item[_T], Any, None]


@dataclass
class Position:
    """Where a watch of the policy stands, so that a broken one goes on without a gap."""

    revision: int
    """The next revision wanted. 0 means the one in force."""

    def make_call(self) -> Call[control_pb2.Policy]:
        """Ask for what is still to come."""
        return requests.watch_policy(self.revision)

    def move_past(self, policy: control_pb2.Policy) -> None:
        """Note what came."""
        self.revision = policy.revision + 1


def list_all(make_call: Callable[[str], Call[Any]], find_items: Callable[[Any], Iterable[_T]]) -> Steps[_T]:
    """Ask page by page for everything that a list method has."""
    token = ""
    while True:
        page = yield make_call(token)
        for item in find_items(page):
            yield Item(item)
        token = page.next_page_token
        if not token:
            return


def list_revisions() -> Steps[control_pb2.Policy]:
    """All revisions, newest first."""
    return list_all(requests.list_revisions, lambda page: page.policies)


def list_engines() -> Steps[control_pb2.EngineStatus]:
    """All engines, by id."""
    return list_all(requests.list_engines, lambda page: page.engines)


def list_probe_sets() -> Steps[probe_sets_pb2.ProbeSet]:
    """All probe sets, by name."""
    return list_all(requests.list_probe_sets, lambda page: page.probe_sets)


def list_rollouts() -> Steps[rollouts_pb2.Rollout]:
    """All roll-outs, newest first."""
    return list_all(requests.list_rollouts, lambda page: page.rollouts)


def list_audit_entries() -> Steps[audit_log_pb2.AuditEntry]:
    """The whole audit log, newest first."""
    return list_all(requests.list_audit_entries, lambda page: page.entries)


def diff_policies(before: int | Policy, after: int | Policy) -> Steps[tuple[Change, ...]]:
    """What changes from one policy to another; numbers are revisions, 0 the one in force."""
    policies = []
    for side in (before, after):
        policies.append(side if isinstance(side, Policy) else wire.policy_from_proto((yield requests.get_policy(side))))
    yield Item(find_policy_changes(*policies))


def wait_until_synced(revision: int, timeout_seconds: float, rollout: int | None) -> Steps[control_pb2.Status]:
    """Ask for the status until every connected engine runs the revision, and the roll-out's candidate beside it (0: none; None: any)."""
    deadline, poll = time.monotonic() + timeout_seconds, _MIN_POLL_SECONDS
    while True:
        status = yield requests.get_status()
        late = _find_late(status, revision, rollout)
        if late == []:
            yield Item(status)
            return
        left = deadline - time.monotonic()
        if left <= 0:
            missing = f"waiting for {', '.join(late)}" if late else "no engine is connected"
            raise NotSynced(f"{_describe(revision, rollout)} is not in force everywhere after {timeout_seconds:g} s: {missing}")
        yield Pause(min(poll, left))
        poll = min(poll * 1.3, _MAX_POLL_SECONDS)


def _find_late(status: control_pb2.Status, revision: int, rollout: int | None) -> list[str] | None:
    """Return the connected engines that are not there yet; None where none is connected.

    Raises:
        NotSynced: an engine refused it.
    """
    live = [e for e in status.engines if e.state != control_pb2.ENGINE_STATE_STALE]
    for engine in live:
        if engine.state == control_pb2.ENGINE_STATE_NACKED and engine.desired_revision >= revision:
            refused = _describe(engine.desired_revision, rollout)
            raise NotSynced(f"engine {engine.engine.engine_id} refused {refused}: {engine.error.message}")
    late = [
        e.engine.engine_id
        for e in live
        if e.state != control_pb2.ENGINE_STATE_SYNCED or e.desired_revision < revision or rollout not in (None, e.active_rollout)
    ]
    return late if live else None


def _describe(revision: int, rollout: int | None) -> str:
    return f"revision {revision}" + (f" with roll-out {rollout}" if rollout else "")


def watch_rollout(name: str | int, interval_seconds: float) -> Steps[rollouts_pb2.Rollout]:
    """Ask for a roll-out again and again; hand it on now and whenever it changed, until it is over."""
    seen = None
    while True:
        rollout = yield requests.get_rollout(name)
        name = rollout.name  # the one under way at first, whatever starts after it
        found = rollout.SerializeToString(deterministic=True)  # messages with NaN are unequal to themselves
        if found != seen:
            yield Item(rollout)
        if rollout.state in ENDED:
            return
        seen = found
        yield Pause(interval_seconds)


def wait_for_rollout(name: str | int, timeout_seconds: float, interval_seconds: float) -> Steps[rollouts_pb2.Rollout]:
    """Ask for a roll-out until it is over."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        rollout = yield requests.get_rollout(name)
        name = rollout.name
        if rollout.state in ENDED:
            yield Item(rollout)
            return
        left = deadline - time.monotonic()
        if left <= 0:
            state = rollouts_pb2.RolloutState.Name(rollout.state).removeprefix("ROLLOUT_STATE_")
            raise NotSynced(f"{name} is not over after {timeout_seconds:g} s: {state}, {rollout.reason or 'no verdict yet'}")
        yield Pause(min(interval_seconds, left))
