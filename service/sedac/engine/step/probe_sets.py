"""The probe sets of a worker: the one it started with, and those read beside the running engine, ready to be swapped in.

`preload` is called between two steps and returns at once; a thread of its own reads and verifies the directory. Steps never wait
for it, and it touches nothing that they read. Only the probes of a set are kept, its reduced levels are those attached.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sedac.errors import ArtifactError
from sedac.policy.layout import Layout, ProbeSetSummary, find_fit_problem
from sedac.probe.probe import LREProbe

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """The probes of a set by layer, on the CPU."""

    sha256: str
    probes: dict[int, LREProbe]


@dataclass(kw_only=True)
class _Entry:
    state: Literal["loading", "ready", "failed"] = "loading"
    problem: str = ""
    summary: ProbeSetSummary | None = None
    """Summary of whatever could be read, also where it does not fit."""
    loaded: Loaded | None = None
    is_fresh: bool = True
    """Whether it was asked for since the last policy came into force."""


@dataclass(kw_only=True)
class ProbeSets:
    """The sets of one worker, by digest; see the module's docstring."""

    layout: Layout
    attached: Loaded
    _entries: dict[str, _Entry] = field(default_factory=dict)

    def preload(self, directory: Path, sha256: str) -> None:
        """Start reading the set in `directory`, whose weights have this digest; nothing to do where it is here or on its way."""
        entry = self._entries.get(sha256)
        if sha256 == self.attached.sha256:
            return
        if entry is not None and entry.state != "failed":
            entry.is_fresh = True
            return
        entry = self._entries[sha256] = _Entry()
        threading.Thread(target=self._load, args=(directory, sha256, entry), name="sedac-preload", daemon=True).start()

    def get_state(self, sha256: str) -> dict[str, Any]:
        """Return {"state": "loading" | "ready" | "failed" | "unknown", "problem": text} of a set; `ready`: a policy may name it."""
        if sha256 == self.attached.sha256:
            return {"state": "ready", "problem": ""}
        entry = self._entries.get(sha256)
        return {"state": entry.state, "problem": entry.problem} if entry else {"state": "unknown", "problem": ""}

    def _load(self, directory: Path, sha256: str, entry: _Entry) -> None:
        # Here and not above: what only computes with probes runs without safetensors (benchmarks/cuda on a bare machine).
        from sedac.probe import artifact
        from sedac.probe.verify import WEIGHTS

        problem = f"reading {directory} failed; see the engine's log"
        try:
            probe_set = artifact.load(directory)
            manifest = probe_set.manifest
            if manifest.sha256 != sha256:
                raise ArtifactError(f"{directory} has sha256 {manifest.sha256}, {sha256} was asked for; fetch the probe set again")
            entry.summary = ProbeSetSummary(
                name=manifest.name,
                sha256=sha256,
                size_bytes=(directory / WEIGHTS).stat().st_size,
                num_layers=manifest.num_layers,
                hidden_size=manifest.hidden_size,
                rank=manifest.rank,
                checkpoint_layers=tuple(p.layer for p in manifest.probes),
                levels_sha256=probe_set.levels_sha256,
            )
            problem = find_fit_problem(entry.summary, self.layout)
            if not problem:
                entry.loaded = Loaded(sha256=sha256, probes=probe_set.probes)
        except ArtifactError as error:
            problem = str(error)
        finally:
            entry.problem, entry.state = problem, "failed" if problem else "ready"
        if problem:
            _log.error("probe set %s can't be used: %s", sha256[:12], problem)

    def get_summaries(self) -> dict[str, ProbeSetSummary]:
        """Return by name what was preloaded, also what does not fit; the newest where two have one name."""
        return {entry.summary.name: entry.summary for entry in list(self._entries.values()) if entry.summary and entry.state != "loading"}

    def find(self, name: str) -> Loaded:
        """Return the set that a validated policy names; empty: the attached one."""
        summary = self.get_summaries().get(name)
        loaded = self._entries[summary.sha256].loaded if summary else None
        return loaded or self.attached

    def drop_unused(self, used: Collection[str]) -> None:
        """Forget the sets whose digest is not among those `used`, but none asked for since the last call."""
        self._entries = {sha256: e for sha256, e in self._entries.items() if e.is_fresh or sha256 in used}
        for entry in self._entries.values():
            entry.is_fresh = False
