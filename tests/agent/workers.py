"""Workers as the agent sees them: real validation and revisions, counters and reports that a test sets."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, replace

from sedac.errors import PolicyInvalid
from sedac.policy import Layout, Policy, validate
from sedac.stats import Stats

LAYOUT = Layout(num_layers=12, hidden_size=8, checkpoint_layers=(2, 5, 8), probe_set="demo", levels=("full", "skip", "width-25"))


class Workers:
    """Stands in for vLLM's engine client with two workers; answers cross the wire as JSON, as they do from another process."""

    def __init__(self, layout: Layout = LAYOUT) -> None:
        self.layout = layout
        self.revisions = [0, 0]
        self.policies = [Policy(), Policy()]
        self.stats = Stats()
        self.reports: dict[str, dict] = {}
        self.gate = asyncio.Event()
        self.gate.set()

    async def collective_rpc(self, method, timeout=None, args=()):  # noqa: ASYNC109  vLLM's signature
        await self.gate.wait()
        return [json.loads(json.dumps(getattr(self, f"_{method}")(worker, *args))) for worker in range(2)]

    def _sedac_describe(self, worker):
        return asdict(self.layout)

    def _sedac_apply(self, worker, policy, revision):
        try:
            read = Policy.from_dict(policy)
            validate(replace(read, certificate=None), self.layout)
        except PolicyInvalid as error:
            return {"revision": self.revisions[worker], "violations": [[v.field, v.description] for v in error.violations]}
        self.policies[worker], self.revisions[worker] = read, revision
        return {"revision": revision, "violations": []}

    def _sedac_get_stats(self, worker):
        return {**asdict(self.stats), "active_revision": self.revisions[worker]}

    def _sedac_get_report(self, worker, request_id):
        return self.reports.get(request_id) if worker == 0 else None
