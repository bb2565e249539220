"""A certificate: what was shown of one tier of a policy, on which model, with which probes, on how many requests.

`sedac-probes certify` writes it into the policy; the control service and every engine refuse one that is for other knobs, weights or
probes than theirs. It says nothing of requests that differ from those it was made on.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sedac.errors import ConfigError, FieldViolation

if TYPE_CHECKING:
    from sedac.policy.model import Policy

_SHA256 = re.compile("[0-9a-f]{64}")
_KNOBS = ("phase", "scope", "rule", "decay", "sensitivity")
_MAX_CHARS = 256


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Over all draws of `num_requests` requests, at most `delta` of such certificates name a tier whose mean loss is above `eps`."""

    tier: str
    """of the policy that carries the certificate"""
    model: str
    """as it was named, for people; `weights_sha256` decides"""
    weights_sha256: str
    """see sedac.policy.weights"""
    probe_set_sha256: str
    knobs_sha256: str
    """see get_knobs_digest"""
    engine: str
    """versions of vLLM and SEDAC, device and dtype, for people"""
    loss: str
    """mismatch, nll, divergence or module:function"""
    eps: float
    """the mean loss that was tested for; over 0, below 1"""
    delta: float
    """share of certificates that may be wrong; over 0, below 1"""
    procedure: str
    """the test, such as wsr or hb"""
    num_requests: int
    mean_loss: float
    """observed"""
    upper_limit: float
    """of the mean loss, at 1 - delta"""
    data_sha256: str
    """of the requests"""
    date: str
    """ISO 8601"""

    def describe(self) -> str:
        """Return one line for people: `balanced certified: mismatch <= 0.05 at 95 %, 500 requests, 2026-11-21`."""
        confidence = f"{100 * (1 - self.delta):.6g} %"
        return f"{self.tier} certified: {self.loss} <= {self.eps:g} at {confidence}, {self.num_requests} requests, {self.date}"

    def find_violations(self) -> list[FieldViolation]:
        """Return the fields that no certificate can have, whatever the policy and the engine."""
        bad: list[FieldViolation] = []
        for name, least in (("tier", 1), ("model", 0), ("engine", 0), ("loss", 1), ("procedure", 1)):
            text = getattr(self, name)
            if not least <= len(text) <= _MAX_CHARS:
                bad.append(FieldViolation(f"certificate.{name}", f"{len(text)} characters; give {least} to {_MAX_CHARS}"))
        for name in ("weights_sha256", "probe_set_sha256", "knobs_sha256", "data_sha256"):
            if not _SHA256.fullmatch(getattr(self, name)):
                bad.append(FieldViolation(f"certificate.{name}", f"{getattr(self, name)[:80]!r} is no sha256; give 64 of 0-9 and a-f"))
        for name in ("eps", "delta"):
            if not 0 < getattr(self, name) < 1:
                bad.append(FieldViolation(f"certificate.{name}", f"{getattr(self, name)} is outside (0, 1); 0.05 is usual"))
        for name in ("mean_loss", "upper_limit"):
            if not math.isfinite(getattr(self, name)):
                bad.append(FieldViolation(f"certificate.{name}", f"{getattr(self, name)} is not a finite number"))
        if not 1 <= self.num_requests < 2**63:
            bad.append(FieldViolation("certificate.num_requests", f"{self.num_requests} is below 1; a certificate rests on requests"))
        try:
            datetime.datetime.fromisoformat(self.date)
        except ValueError:
            bad.append(FieldViolation("certificate.date", f"{self.date[:80]!r} is no ISO 8601 date, such as 2026-11-21"))
        return bad


def get_knobs_digest(policy: Policy, tier: str) -> str:
    """Return the sha256 of all that decides how requests of `tier` are computed, and of nothing else.

    These are the checkpoints, the knobs of deciding, adaptation and the tier itself; not other tiers, the default, whether the policy is
    enabled, or the probe set, whose own digest is in the certificate.

    Raises:
        ConfigError: the policy has no such tier.
    """
    found = {t.name: t for t in policy.get_tiers()}
    if tier not in found:
        raise ConfigError(f"{tier!r} is no tier of this policy; it has {', '.join(found)}")
    knobs = {
        **{name: getattr(policy, name) for name in _KNOBS},
        "checkpoints": [asdict(c) for c in policy.checkpoints],
        "adaptation": asdict(policy.adaptation),
        "tier": asdict(found[tier]),
    }
    return hashlib.sha256(json.dumps(_normalise(knobs), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _normalise(value: Any) -> Any:
    """Write every number as the double that the contract carries, so that 1, 1.0 and -0.0 digest as what the engine gets."""
    if isinstance(value, dict):
        return {key: _normalise(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_normalise(part) for part in value]
    return value if isinstance(value, str | bool) else float(value) + 0.0
