"""Whether a policy fits the engines that are connected, and where they find the probe sets that it names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sedac.contract.v1 import control_pb2
from sedac.errors import FieldViolation, PolicyInvalid
from sedac.policy.check import validate
from sedac.policy.layout import Layout, ProbeSetSummary
from sedac.policy.model import Policy


@dataclass(frozen=True, kw_only=True)
class NamedProbeSets:
    """The probe sets that were uploaded; never changed, only replaced, so that any thread may look at it."""

    stored: Mapping[str, ProbeSetSummary] = field(default_factory=dict)
    """The sets that policies may name, by name."""
    deleted: Mapping[str, str] = field(default_factory=dict)
    """The digests of the sets that are gone, by name."""

    def find_references(self, *policies: Policy) -> list[control_pb2.ProbeSetReference]:
        """Return where engines find the uploaded sets that policies name."""
        named = {policy.probe_set: self.stored[policy.probe_set] for policy in policies if policy.probe_set in self.stored}
        return [control_pb2.ProbeSetReference(name=name, sha256=found.sha256, size_bytes=found.size_bytes) for name, found in named.items()]


def check_fit(policy: Policy, in_force: Policy | None, layouts: Mapping[str, Layout], probe_sets: NamedProbeSets) -> None:
    """Check a policy against engines, by their ids and layouts, as far as the policy in force fits them.

    What an engine refuses of the policy in force already is no reason to refuse a change: one engine that doesn't fit
    must not keep the others from being switched off.

    Raises:
        PolicyInvalid: with every field at fault, and the engines that it doesn't fit.
    """
    found: dict[FieldViolation, list[str]] = {}
    for engine_id, layout in layouts.items():
        known = _violations(in_force, layout, probe_sets.stored) if in_force else set()
        for violation in sorted(_violations(policy, layout, probe_sets.stored) - known, key=str):
            found.setdefault(violation, []).append(engine_id)
    bad = [FieldViolation(v.field, f"{v.description} (engine {_name(ids)})") for v, ids in found.items()]
    name, gone = policy.probe_set, probe_sets.deleted.get(policy.probe_set)
    is_new = in_force is None or in_force.probe_set != name
    if gone and is_new and not any(layout.probe_set == name for layout in layouts.values()):
        bad = [v for v in bad if v.field != "probe_set"]
        bad.append(FieldViolation("probe_set", f"{name!r} was deleted; upload it again (sha256 {gone[:12]}...), or name another set"))
    if bad:
        raise PolicyInvalid(bad)


def _violations(policy: Policy, layout: Layout, available: Mapping[str, ProbeSetSummary]) -> set[FieldViolation]:
    try:
        validate(policy, layout, available)
    except PolicyInvalid as refused:
        return set(refused.violations)
    return set()


def _name(ids: list[str]) -> str:
    return ids[0] if len(ids) == 1 else f"{ids[0]} and {len(ids) - 1} more"
