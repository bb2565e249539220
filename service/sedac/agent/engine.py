"""The engine as the agent sees it: SEDAC's remote calls over every worker of every rank, through vLLM's `collective_rpc`."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Protocol

from sedac.agent.frontend import call_ranks
from sedac.contract.stats import Stats, add_up
from sedac.errors import ArtifactError, FieldViolation, PolicyInvalid, SedacError
from sedac.policy.layout import Layout
from sedac.policy.model import Candidate, Policy

_TIMEOUT_SECONDS = 30.0  # a worker answers between two steps; a long prefill may take this long
_GRACE_SECONDS = 5.0  # for executors that keep no time themselves


class EngineClient(Protocol):
    """The part of vLLM's engine client that the agent uses."""

    async def collective_rpc(self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()) -> list[Any]:  # noqa: ASYNC109  vLLM's
        """Run `method` in every worker and return one answer each."""
        ...


class EngineDisagreement(SedacError):
    """Workers answered with different revisions."""


class PartlyRefused(PolicyInvalid):
    """Some workers refused what others took."""


@dataclass(kw_only=True)
class AttachedEngine:
    """Describes, steers and reads the workers of one engine."""

    client: EngineClient
    num_workers: int = 0
    num_ranks: int = 0
    """Number of data-parallel ranks."""

    async def describe(self) -> Layout:
        """Return what is attached, the same in every worker.

        Raises:
            EngineDisagreement: it is not the same.
        """
        ranks = await self._call("sedac_describe")
        answers = [answer for rank in ranks for answer in rank]
        self.num_workers, self.num_ranks = len(answers), len(ranks)
        found: dict[str, Any] = answers[0]
        if any(answer != found for answer in answers):
            raise EngineDisagreement("the workers have different probe sets or layers attached; start every rank with the same settings")
        return Layout(**{**found, "checkpoint_layers": tuple(found["checkpoint_layers"]), "levels": tuple(found["levels"])})

    async def get_faster_rows(self) -> dict[str, int]:
        """Return up to how many rows each reduced level is faster than full, as the first worker has it; empty: that is not measured."""
        ranks = await self._call("sedac_get_faster_rows")
        return dict(ranks[0][0])

    async def apply(self, policy: Policy, revision: int, candidate: Candidate | None = None) -> None:
        """Put a policy, and a roll-out's candidate beside it, into force in every worker, between two steps.

        Raises:
            PolicyInvalid: refused; the old ones stay in force.
            PartlyRefused: the same, but some workers run the new ones now.
            EngineDisagreement: the workers confirmed something else.
        """
        args: tuple[Any, ...] = (policy.to_dict(), revision)
        answers = await self._call_all("sedac_apply", *args, *([candidate.to_dict()] if candidate else []))
        violations = {tuple(v) for answer in answers for v in answer["violations"]}
        if violations:
            refused = PolicyInvalid if all(answer["violations"] for answer in answers) else PartlyRefused
            raise refused([FieldViolation(field, description) for field, description in sorted(violations)])
        sent = (revision, candidate.rollout if candidate else 0)
        confirmed = {(answer["revision"], answer.get("rollout", 0)) for answer in answers}
        if confirmed != {sent}:
            found = ", ".join(f"{number} with roll-out {rollout}" for number, rollout in sorted(confirmed))
            raise EngineDisagreement(f"workers confirmed revisions {found}; revision {sent[0]} with roll-out {sent[1]} was sent; restart the engine")

    async def preload(self, directory: str, sha256: str) -> None:
        """Start loading a verified probe set in every worker; `is_preloaded` tells how it goes."""
        await self._call_all("sedac_preload", directory, sha256)

    async def is_preloaded(self, sha256: str) -> bool:
        """Whether every worker has a probe set ready.

        Raises:
            ArtifactError: a worker could not load it, or never heard of it.
        """
        answers = await self._call_all("sedac_preloaded", sha256)
        for answer in answers:
            if answer["state"] not in ("ready", "loading"):
                raise ArtifactError(f"a worker could not load probe set {sha256[:12]}...: {answer['problem'] or answer['state']}")
        return all(answer["state"] == "ready" for answer in answers)

    async def has(self, sha256: str) -> bool:
        """Whether every worker has a probe set ready, whatever became of earlier tries."""
        return all(answer["state"] == "ready" for answer in await self._call_all("sedac_preloaded", sha256))

    async def get_stats(self) -> Stats:
        """Return the totals of all ranks; of one rank's tensor-parallel workers the first, for they see the same tokens."""
        return add_up([Stats.from_dict(answers[0]) for answers in await self._call("sedac_get_stats")])

    async def find_report(self, request_id: str) -> dict[str, Any] | None:
        """Return what a response was computed with: tier, `certified`, revision, tokens, MLPs and their share; None: no worker remembers it."""
        answers = await self._call_all("sedac_get_report", request_id)
        return next((answer for answer in answers if answer is not None), None)

    async def _call_all(self, method: str, *args: Any) -> list[Any]:
        return [answer for rank in await self._call(method, *args) for answer in rank]

    async def _call(self, method: str, *args: Any) -> list[list[Any]]:
        """Return the workers' answers by data-parallel rank."""
        async with asyncio.timeout(_TIMEOUT_SECONDS + _GRACE_SECONDS):
            return await call_ranks(self.client, method, _TIMEOUT_SECONDS, args)
