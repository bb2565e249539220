"""The fleet: every engine that the control service has heard of since it started, and what each one runs.

Lives on the event loop; the servicer writes, watchers wait for the next version. A slow watcher misses versions, it never
holds anyone up.
"""

from __future__ import annotations

import asyncio
import datetime
from dataclasses import dataclass, field

from google.rpc import status_pb2

from sedac.control.v1 import control_pb2
from sedac.policy import Layout

STATES = {
    control_pb2.ENGINE_STATE_PENDING: "pending",
    control_pb2.ENGINE_STATE_SYNCED: "synced",
    control_pb2.ENGINE_STATE_NACKED: "nacked",
    control_pb2.ENGINE_STATE_STALE: "stale",
}


@dataclass(kw_only=True)
class Engine:
    """One engine's last known state."""

    hello: control_pb2.EngineHello
    state: control_pb2.EngineState = control_pb2.ENGINE_STATE_PENDING
    active_revision: int = 0
    error: status_pb2.Status | None = None
    report: control_pb2.EngineReport = field(default_factory=control_pb2.EngineReport)
    last_seen: datetime.datetime = field(default_factory=lambda: datetime.datetime.now(datetime.UTC))

    @property
    def layout(self) -> Layout:
        """What the engine has attached."""
        hello = self.hello
        return Layout(
            num_layers=hello.num_layers, hidden_size=hello.hidden_size, checkpoint_layers=tuple(hello.checkpoint_layers), probe_set=hello.probe_set
        )

    def to_status(self, desired_revision: int) -> control_pb2.EngineStatus:
        """Write the engine's part of a status message."""
        status = control_pb2.EngineStatus(
            engine=self.hello,
            state=self.state,
            desired_revision=desired_revision,
            active_revision=self.active_revision,
            error=self.error,
            report=self.report,
        )
        status.last_seen_time.FromDatetime(self.last_seen)
        return status


class Fleet:
    """All engines by id, and the version that watchers wait for."""

    def __init__(self) -> None:
        self.engines: dict[str, Engine] = {}
        self.version = 0
        self._changed = asyncio.Event()

    def join(self, hello: control_pb2.EngineHello) -> Engine:
        """Register a new connection of an engine; an older one of the same id is forgotten."""
        engine = Engine(hello=hello, active_revision=hello.active_revision)
        self.engines[hello.engine_id] = engine
        self.touch(engine)
        return engine

    def leave(self, engine: Engine) -> None:
        """Mark a lost connection's engine STALE, unless a newer connection has taken its place."""
        if self.engines.get(engine.hello.engine_id) is engine:
            engine.state = control_pb2.ENGINE_STATE_STALE
            self.notify()

    def touch(self, engine: Engine) -> None:
        """Note that an engine was heard of, and wake the watchers."""
        engine.last_seen = datetime.datetime.now(datetime.UTC)
        self.notify()

    def notify(self) -> None:
        """Wake everyone who waits for a change."""
        self.version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait(self, seen: int, timeout_seconds: float | None = None) -> int:
        """Return the version once it is newer than `seen`, or after the timeout."""
        if self.version == seen:
            try:
                async with asyncio.timeout(timeout_seconds):
                    await self._changed.wait()
            except TimeoutError:
                return self.version
        return self.version

    def connected(self) -> list[Engine]:
        """Return the engines with a live connection."""
        return [e for e in self.engines.values() if e.state != control_pb2.ENGINE_STATE_STALE]

    def count_states(self) -> dict[str, int]:
        """Return how many engines are in each state; every state has a number."""
        counts = dict.fromkeys(STATES.values(), 0)
        for engine in self.engines.values():
            counts[STATES[engine.state]] += 1
        return counts
