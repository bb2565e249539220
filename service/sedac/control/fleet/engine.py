"""One engine: what it should run, what it said of itself, and the state that follows from what was pushed and answered."""

from __future__ import annotations

import asyncio
import datetime
import time
from dataclasses import dataclass, field
from typing import NamedTuple

from google.rpc import status_pb2

from sedac.contract import wire
from sedac.contract.v1 import control_pb2
from sedac.policy.layout import Layout


class Target(NamedTuple):
    """What an engine should run; whatever changes in it is pushed."""

    revision: int = 0
    rollout: int = 0
    """The roll-out whose candidate runs beside the policy; 0: none."""
    share: float = 0.0
    attempt: int = 0
    """Grows when the same is to be pushed again."""


@dataclass(kw_only=True, eq=False)
class Engine:
    """One connection of an engine, and what it last said."""

    hello: control_pb2.EngineHello
    active_revision: int
    peer: str = ""
    connected: bool = True
    active_rollout: int = 0
    answered: Target = field(default_factory=Target)
    """The newest push that this connection answered."""
    error: status_pb2.Status | None = None
    """Why it refused that push, where it did."""
    report: control_pb2.EngineReport = field(default_factory=control_pb2.EngineReport)
    reported: float = field(default_factory=time.monotonic)
    """When the newest report came, in seconds on the monotonic clock; before the first, when the connection began."""
    last_seen: datetime.datetime = field(default_factory=lambda: datetime.datetime.now(datetime.UTC))
    shown_state: control_pb2.EngineState | None = None
    """The state under which the metrics count the engine; None: it is not counted."""
    version: int = 0
    """The fleet's version when anything but counters last changed here."""
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the connection's task should look again: at a new policy, an answer, the end."""

    @property
    def id(self) -> str:
        """The engine's name, stable over reconnects."""
        return self.hello.engine_id

    @property
    def layout(self) -> Layout:
        """What the engine has attached."""
        return wire.layout_from_hello(self.hello)

    def find_state(self, target: Target) -> control_pb2.EngineState:
        """Return the state that follows from what was pushed and answered."""
        if not self.connected:
            return control_pb2.ENGINE_STATE_STALE
        if self.answered != target:
            return control_pb2.ENGINE_STATE_PENDING
        return control_pb2.ENGINE_STATE_NACKED if self.error else control_pb2.ENGINE_STATE_SYNCED

    def to_status(self, target: Target) -> control_pb2.EngineStatus:
        """Write the engine's part of a status message."""
        state = self.find_state(target)
        status = control_pb2.EngineStatus(
            engine=self.hello,
            state=state,
            desired_revision=target.revision,
            active_revision=self.active_revision,
            active_rollout=self.active_rollout,
            error=self.error if state == control_pb2.ENGINE_STATE_NACKED else None,
            report=self.report,
        )
        status.last_seen_time.FromDatetime(self.last_seen)
        return status

    def touch(self) -> None:
        """Note that the engine was heard of."""
        self.last_seen = datetime.datetime.now(datetime.UTC)
