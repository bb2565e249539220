"""The engine as the agent sees it: SEDAC's remote calls over every worker, through vLLM's `collective_rpc`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from sedac.errors import FieldViolation, PolicyInvalid, SedacError
from sedac.policy import Layout, Policy
from sedac.stats import Stats

_TIMEOUT_SECONDS = 30.0  # a worker answers between two steps; a long prefill may take this long


class EngineClient(Protocol):
    """The part of vLLM's engine client that the agent uses."""

    async def collective_rpc(self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()) -> list[Any]:  # noqa: ASYNC109  vLLM's
        """Run `method` in every worker and return one answer each."""
        ...


class EngineDisagreement(SedacError):
    """Workers answered with different revisions."""


@dataclass(kw_only=True)
class AttachedEngine:
    """Describes, steers and reads the workers of one engine."""

    client: EngineClient
    num_workers: int = 0

    async def describe(self) -> Layout:
        """Return what is attached, the same in every worker."""
        answers = await self.client.collective_rpc("sedac_describe", _TIMEOUT_SECONDS)
        self.num_workers = len(answers)
        found: dict[str, Any] = answers[0]
        return Layout(**{**found, "checkpoint_layers": tuple(found["checkpoint_layers"]), "levels": tuple(found["levels"])})

    async def apply(self, policy: Policy, revision: int) -> int:
        """Put `policy` into force in every worker, between two steps; returns the revision that all of them confirm.

        Raises:
            PolicyInvalid: refused; the old policy stays in force.
            EngineDisagreement: the workers confirmed different revisions.
        """
        answers = await self.client.collective_rpc("sedac_apply", _TIMEOUT_SECONDS, (policy.to_dict(), revision))
        violations = {tuple(v) for answer in answers for v in answer["violations"]}
        if violations:
            raise PolicyInvalid([FieldViolation(field, description) for field, description in sorted(violations)])
        confirmed = {answer["revision"] for answer in answers}
        if confirmed != {revision}:
            raise EngineDisagreement(f"workers confirmed revisions {sorted(confirmed)}, revision {revision} was sent; restart the engine")
        return revision

    async def get_stats(self) -> Stats:
        """Return the first worker's totals; tensor-parallel workers see the same tokens."""
        answer = (await self.client.collective_rpc("sedac_get_stats", _TIMEOUT_SECONDS))[0]
        return Stats.from_dict(answer)

    async def find_report(self, request_id: str) -> dict[str, Any] | None:
        """Return what a response was computed with: tier, `certified`, revision, tokens, MLPs and their share; None: no worker remembers it."""
        answers = await self.client.collective_rpc("sedac_get_report", _TIMEOUT_SECONDS, (request_id,))
        return next((answer for answer in answers if answer is not None), None)
