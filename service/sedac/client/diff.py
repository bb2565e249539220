"""What changed between two policies, or between two states of anything that is JSON: one line per field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sedac.policy.model import Policy

_KEYS = ("layer", "name", "engine_id")
"""Keys that tell the members of a list apart, so that one put in before them doesn't change them all."""


@dataclass(frozen=True)
class Change:
    """One field that differs."""

    field: str
    """Path of the field, such as `checkpoints[5].threshold` or `tiers[night].floor`."""
    before: Any
    """Value before the change. None where the field was not there."""
    after: Any
    """Value after the change. None where the field is gone."""

    def __str__(self) -> str:
        return f"{self.field}: {_show(self.before)} -> {_show(self.after)}"


def find_policy_changes(before: Policy, after: Policy) -> tuple[Change, ...]:
    """Return the knobs that differ; checkpoints go by layer, tiers by name."""
    return find_changes(before.to_dict(), after.to_dict())


def find_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[Change, ...]:
    """Return what differs between two JSON objects, in their order of fields."""
    old, new = dict(_flatten("", before)), dict(_flatten("", after))
    return tuple(Change(field, old.get(field), new.get(field)) for field in {**old, **new} if old.get(field) != new.get(field))


def _flatten(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _flatten(f"{path}.{name}" if path else name, part)
    elif isinstance(value, list | tuple) and any(isinstance(part, Mapping) for part in value):
        for i, part in enumerate(value):
            key = next((part[name] for name in _KEYS if name in part), i)
            yield from _flatten(f"{path}[{key}]", part)
    else:
        yield path, list(value) if isinstance(value, tuple) else value


def _show(value: Any) -> str:
    return "-" if value is None else str(value)
