"""A model's servers on one machine, of which one at a time works: what rounds, quality and idle measurements have in common."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from sedac.bench.cells import Cells
from sedac.bench.load import Ask, run_load
from sedac.bench.matrix import DEFAULT_TIER, Load, Matrix, Model, Row
from sedac.bench.plans import find_directory, plan_server
from sedac.bench.prompts import Prompts
from sedac.bench.servers import Server, Servers
from sedac.bench.tuning import set_knobs

_WAKE_REQUESTS, _WAKE_TOKENS = 2, 16
_SETTLE_SECONDS = 2.0

Step = Callable[[str], None]
"""Is told what is done next; called once for every step of the progress."""


@dataclass(kw_only=True)
class Stage:
    """One model's measurement."""

    matrix: Matrix
    model: Model
    cells: Cells
    servers: Servers
    step: Step

    def __post_init__(self) -> None:
        self.rows = self.matrix.get_rows(self.model)
        self.prompts = Prompts(self.matrix.prompts, find_directory(self.model), seed=self.matrix.seed)

    def start(self) -> None:
        """Start all servers one after the other, then measure what each takes while it idles.

        Raises:
            BenchmarkFailed: one did not get ready.
        """
        for system in self.matrix.get_systems(self.model):
            self.step(f"{self.model.name}: starting {system.name}")
            plan = plan_server(self.matrix, self.model, system, self.servers.make_directory(system.name))
            server = self.servers.start(plan)
            self.cells.add("start", model=self.model.name, system=system.name, ready_seconds=server.ready_seconds)
        for system in self.matrix.get_systems(self.model):
            if self.matrix.idle_seconds and not self.cells.get_all("idle", model=self.model.name, system=system.name):
                self.step(f"{self.model.name}: idle {system.name}")
                self.cells.add("idle", model=self.model.name, system=system.name, cpu_share=self._measure_idle(system.name))

    def _measure_idle(self, system: str) -> float:
        server = self.use(system)
        self.wake(server, DEFAULT_TIER)
        time.sleep(_SETTLE_SECONDS)
        began, before = time.monotonic(), server.measure_cpu()
        time.sleep(self.matrix.idle_seconds)
        return (server.measure_cpu() - before) / (time.monotonic() - began)

    def measure_memory(self) -> None:
        """Keep the memory of every server."""
        for server in self.servers.get_all():
            self.cells.add("memory", model=self.model.name, system=server.plan.name, pss_bytes=server.measure_memory())

    def use(self, system: str) -> Server:
        """Thaw one system's server and freeze all others."""
        server = self.servers.use(system)
        assert server is not None
        return server

    def wake(self, server: Server, tier: str) -> None:
        """Send a few short requests, for the first after a pause is slower than others."""
        ask = Ask(url=server.url, tier=tier, num_tokens=_WAKE_TOKENS, salt=f"wake {time.monotonic_ns()}")
        run_load(ask, Load(concurrency=1), self.prompts.take(_WAKE_REQUESTS, self.matrix.prompt_tokens), per_client=_WAKE_REQUESTS)

    def prepare(self, row: Row) -> Server:
        """Return a row's server, thawed, under the row's policy, and awake."""
        server = self.use(row.system.name)
        if row.system.kind == "sedac":
            set_knobs(server, row.tier.knobs)
        self.wake(server, row.tier.name)
        return server
