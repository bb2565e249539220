"""The table of `sedac ctl status` and `watch`: the policy, the roll-out, the guard and all engines."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from sedac.contract.v1 import control_pb2
from sedac.ctl.engine_tables import make_checkpoints_table, make_drafting_table, make_engines_table, make_tier_work_table
from sedac.ctl.policy_tables import make_policy_table
from sedac.ctl.rollout_tables import make_evidence_table, make_guard, make_rollout_table


def make_status(status: control_pb2.Status, before: control_pb2.Status | None = None) -> Group:
    """Show the desired policy and all engines, with rates since the status `before` where one is given."""
    policy = make_policy_table(status.policy) if status.HasField("policy") else Text("no policy yet: no engine has connected")
    parts: list[RenderableType] = [policy, Text()]
    if status.HasField("rollout"):
        parts += [make_rollout_table(status.rollout), Text()]
    if status.evidence:
        parts += [make_evidence_table(status.evidence), Text()]
    if status.guard.HasField("act_time"):
        parts += [make_guard(status.guard), Text()]
    if status.version:  # since 0.2.0
        parts += [Text(f"control service: SEDAC {status.version}"), Text()]
    parts.append(make_engines_table(status.engines, before) if status.engines else Text("no engine has connected"))
    if any(e.report.checkpoints for e in status.engines):
        parts += [Text(), make_checkpoints_table(status)]
    if any(e.report.tiers for e in status.engines):
        parts += [Text(), make_tier_work_table(status.engines, before)]
    if any(e.report.HasField("drafting") for e in status.engines):
        parts += [Text(), make_drafting_table(status.engines, before)]
    return Group(*parts)
