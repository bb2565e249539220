"""The digest of all that decides how a tier's requests are computed; certificates are for it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import is_dataclass
from typing import Any

from sedac.errors import ConfigError
from sedac.policy.knob import list_fields
from sedac.policy.model import Policy


def get_knobs_digest(policy: Policy, tier: str) -> str:
    """Return the sha256 of all that decides how requests of `tier` are computed, and of nothing else.

    These are the knobs that say so of themselves (`decides`); of the tiers only the one asked for. A knob that is younger than
    certificates (`since`) is left out at its default, so that older certificates hold.

    Raises:
        ConfigError: the policy has no such tier.
    """
    found = {t.name: t for t in policy.get_tiers()}
    if tier not in found:
        raise ConfigError(f"{tier!r} is no tier of this policy; it has {', '.join(found)}")
    knobs = _list_deciding(policy)
    del knobs["tiers"]
    knobs["tier"] = _list_deciding(found[tier])
    return hashlib.sha256(json.dumps(knobs, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _list_deciding(model: Any) -> dict[str, Any]:
    found = {}
    for field in list_fields(type(model)):
        value = getattr(model, field.name)
        if field.knob and field.knob.decides and not (field.knob.since and value == field.default):
            found[field.name] = _normalise(value)
    return found


def _normalise(value: Any) -> Any:
    """Write every number as the double that the contract carries, so that 1, 1.0 and -0.0 digest as what the engine gets."""
    if is_dataclass(value):
        return _list_deciding(value)
    if isinstance(value, list | tuple):
        return [_normalise(part) for part in value]
    return value if isinstance(value, str | bool) else float(value) + 0.0
