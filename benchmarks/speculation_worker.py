"""The worker of benchmarks/speculation.py: SEDAC's own, and a way to give each setting a controller of its own.

A controller learns from what it serves. Benchmarks serve one setting after the other with one engine; what was learned in one must not
help in another.
"""

from __future__ import annotations

from sedac.engine.drafting.controller import Controller
from sedac.engine.step.worker import SedacWorker


class Worker(SedacWorker):
    """See the module's docstring."""

    def bench_use_controller(self, name: str) -> None:
        """Draft with the controller of this name from now on; a new one starts from nothing."""
        controllers: dict[str, Controller] = self.__dict__.setdefault("bench_controllers", {})
        assert self.sedac_drafter is not None
        self.sedac_drafter.controller = controllers.setdefault(name, Controller())
