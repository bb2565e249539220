"""Workers as the agent sees them: real validation and revisions, counters and reports that a test sets."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import asdict, replace

from sedac.contract.stats import Stats
from sedac.errors import PolicyInvalid
from sedac.policy.check import validate
from sedac.policy.layout import Layout
from sedac.policy.model import Policy

LAYOUT = Layout(num_layers=12, hidden_size=8, checkpoint_layers=(2, 5, 8), probe_set="demo", levels=("full", "skip", "width-25"))


class Workers:
    """Stands in for vLLM's engine client with two workers; answers cross the wire as JSON, as they do from another process."""

    def __init__(self, layout: Layout = LAYOUT) -> None:
        self.layout = layout
        self.revisions = [0, 0]
        self.policies = [Policy(), Policy()]
        self.stats = Stats()
        self.reports: dict[str, dict] = {}
        self.candidates: list[dict | None] = [None, None]
        self.probe_sets: dict[str, dict] = {}
        """Answers of `sedac_preloaded`, by the probe set's digest."""
        self.preloads: list[tuple[str, str]] = []
        self.failing: dict[str, Exception] = {}
        """Errors that are raised instead of an answer, by method."""
        self.num_calls: Counter[str] = Counter()
        """Number of calls so far, by method."""
        self.gate = asyncio.Event()
        self.gate.set()

    async def collective_rpc(self, method, timeout=None, args=()):  # noqa: ASYNC109  vLLM's signature
        self.num_calls[method] += 1
        await self.gate.wait()
        if method in self.failing:
            raise self.failing[method]
        return [json.loads(json.dumps(getattr(self, f"_{method}")(worker, *args))) for worker in range(2)]

    def _sedac_describe(self, worker):
        return asdict(self.layout)

    def _sedac_get_faster_rows(self, worker):
        return {"width-30": 4}

    def _sedac_apply(self, worker, policy, revision, candidate=None):
        rollout = self.candidates[worker]["rollout"] if self.candidates[worker] else 0
        try:
            read = Policy.from_dict(policy)
            for each in (read, Policy.from_dict(candidate["policy"])) if candidate else (read,):
                loaded = any(state["state"] == "ready" for state in self.probe_sets.values())
                validate(replace(each, certificate=None, probe_set="" if loaded else each.probe_set), self.layout)
        except PolicyInvalid as error:
            return {"revision": self.revisions[worker], "rollout": rollout, "violations": [[v.field, v.description] for v in error.violations]}
        self.policies[worker], self.revisions[worker], self.candidates[worker] = read, revision, candidate
        return {"revision": revision, "rollout": candidate["rollout"] if candidate else 0, "violations": []}

    def _sedac_preload(self, worker, directory, sha256):
        if worker == 0:
            self.preloads.append((directory, sha256))
        self.probe_sets.setdefault(sha256, {"state": "ready", "problem": ""})

    def _sedac_preloaded(self, worker, sha256):
        return self.probe_sets.get(sha256, {"state": "unknown", "problem": ""})

    def _sedac_get_stats(self, worker):
        return {**asdict(self.stats), "active_revision": self.revisions[worker]}

    def _sedac_get_report(self, worker, request_id):
        return self.reports.get(request_id) if worker == 0 else None
