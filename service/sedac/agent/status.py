"""What GET /sedac/status answers: an agent's state as plain JSON types."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sedac.agent.metrics import get_target_exit_rates
from sedac.policy.model import EXACT, FULL, Policy, Tier

if TYPE_CHECKING:
    from sedac.agent.agent import Agent
    from sedac.contract.stats import Stats


def describe_agent(agent: Agent) -> dict[str, Any]:
    """Return what the agent serves by, what its engine has attached and counted, and what became of the newest push."""
    settings, policy = agent.settings, agent.policy
    state = "STANDALONE" if not settings.control_address else "STALE" if not agent.connected else "NACKED" if agent.refusal else "SYNCED"
    return {
        "engine_id": settings.engine_id,
        "state": state,
        "control_address": settings.control_address,
        "revision": agent.revision,
        "refusal": agent.refusal,
        "certified": policy.certificate is not None,
        "policy": policy.to_dict(),
        "candidate": agent.candidate.to_dict() if agent.candidate else None,
        "layout": asdict(agent.layout),
        "faster_rows": agent.faster_rows,
        "tiers": [asdict(tier) for tier in (Tier(name=EXACT, level=FULL, threshold_scale=0.0), *policy.get_tiers())],
        "default_tier": policy.default_tier if policy.enabled else EXACT,
        "adaptation": _describe_adaptation(policy, agent.stats),
        "stats": asdict(agent.stats),
        "drafting": agent.stats.drafting.get_rates() if agent.stats.drafting else None,
        "evidence": agent.list_evidence(),
        "num_audits_waiting": agent.auditor.get_num_waiting() if agent.auditor else 0,
    }


def _describe_adaptation(policy: Policy, stats: Stats) -> dict[str, Any]:
    knobs = policy.adaptation
    state = "off" if not (knobs.enabled and policy.enabled) else "frozen" if knobs.frozen else "on"
    now = {c.layer: c for c in stats.checkpoints}
    targets = get_target_exit_rates(policy)
    checkpoints = [
        {
            "layer": c.layer,
            "policy_threshold": c.threshold,
            "threshold": now[c.layer].threshold if state != "off" and c.layer in now else c.threshold,
            "exit_rate": now[c.layer].exit_rate if c.layer in now else 0.0,
            "target_exit_rate": targets.get(c.layer),
        }
        for c in policy.checkpoints
    ]
    return {"state": state, "generation": knobs.generation, "num_adaptations": stats.num_adaptations, "checkpoints": checkpoints}
