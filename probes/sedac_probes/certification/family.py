"""The family of policies that certification tests, in order from the safest to the fastest, made from a calibrated probe set.

The order was fixed by calibration text, before any request of the certification was answered: testing in sequence needs that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sedac.errors import ConfigError
from sedac.policy.check import validate
from sedac.policy.layout import Layout
from sedac.policy.model import FULL, SKIP, Checkpoint, Policy, Tier
from sedac.probe.manifest import LevelRecord, Manifest

TIER = "certified"
"""Name of the tier that certification adds."""
_EXIT_SCALES = (0.25, 0.5, 1.0, 2.0)  # of the thresholds, for a probe set without levels


@dataclass(frozen=True, kw_only=True)
class Member:
    """One choice of what a bounded request gets."""

    floor: str
    """Level of every generated token."""
    level: str
    """Level of confident tokens above the checkpoint. If it is the floor itself, the probes decide nothing."""
    threshold_scale: float = 1.0

    @property
    def label(self) -> str:
        """What tables call it."""
        if self.floor == self.level:
            return self.floor
        return f"{self.floor}, {self.level}" + (f" x {self.threshold_scale:g}" if self.threshold_scale != 1 else "")


def make_family(manifest: Manifest) -> list[Member]:
    """Return the levels that no other beats, by saving, each followed by the set's tiers that go on from it to a higher level.

    A set without levels gives hard exits at growing thresholds.
    """
    saved = {level.name: level.saved for level in manifest.levels}
    if not saved:
        return [Member(floor=FULL, level=SKIP, threshold_scale=scale) for scale in _EXIT_SCALES]
    family = []
    for record in sorted(_find_front(manifest.levels), key=lambda r: r.saved):
        family.append(Member(floor=record.name, level=record.name))
        mixed = [t for t in manifest.tiers if t.floor == record.name and saved.get(t.level, -1.0) > record.saved and t.threshold_scale > 0]
        mixed.sort(key=lambda t: (saved[t.level], t.threshold_scale))
        family += [Member(floor=t.floor, level=t.level, threshold_scale=t.threshold_scale) for t in mixed]
    return list(dict.fromkeys(family))


def _find_front(levels: Sequence[LevelRecord]) -> list[LevelRecord]:
    def is_beaten(level: LevelRecord, other: LevelRecord) -> bool:
        """Return whether the other level is better in saving or perplexity, and in neither worse."""
        better = other.saved > level.saved or other.perplexity_ratio < level.perplexity_ratio
        return better and other.saved >= level.saved and other.perplexity_ratio <= level.perplexity_ratio

    return [level for level in levels if not any(is_beaten(level, other) for other in levels)]


def parse_member(text: str) -> Member:
    """Read FLOOR, or FLOOR,LEVEL or FLOOR,LEVEL,SCALE.

    Raises:
        ConfigError: it is none of them.
    """
    parts = [part.strip() for part in text.split(",")]
    try:
        scale = float(parts[2]) if len(parts) > 2 else 1.0
    except ValueError:
        scale = -1.0
    if not 1 <= len(parts) <= 3 or not all(parts) or not 0 <= scale < math.inf:
        raise ConfigError(f"--member {text!r}: give FLOOR or FLOOR,LEVEL or FLOOR,LEVEL,SCALE, such as contextual-20,contextual-30,0.5")
    return Member(floor=parts[0], level=parts[1] if len(parts) > 1 else parts[0], threshold_scale=scale)


def make_policy(manifest: Manifest, member: Member) -> Policy:
    """Return the policy with `member` as its tier `certified`, which requests get that name none; the set's own tiers stay.

    Raises:
        PolicyInvalid: the member names levels that the probe set does not have.
    """
    tiers = [Tier(name=t.name, floor=t.floor, level=t.level, threshold_scale=t.threshold_scale) for t in manifest.tiers if t.name != TIER]
    chosen = Tier(name=TIER, floor=member.floor, level=member.level, threshold_scale=member.threshold_scale)
    policy = Policy(
        enabled=True,
        probe_set=manifest.name,
        checkpoints=tuple(Checkpoint(layer=p.layer, threshold=p.threshold) for p in manifest.probes),
        tiers=(*tiers, chosen),
        default_tier=TIER,
    )
    validate(policy, make_layout(manifest))
    return policy


def make_layout(manifest: Manifest, weights_sha256: str = "") -> Layout:
    """Return what an engine with this probe set has attached, all checkpoints and levels, to weights of that digest (empty: unknown)."""
    return Layout(
        num_layers=manifest.num_layers,
        hidden_size=manifest.hidden_size,
        checkpoint_layers=tuple(p.layer for p in manifest.probes),
        probe_set=manifest.name,
        levels=(FULL, SKIP, *(level.name for level in manifest.levels)),
        weights_sha256=weights_sha256,
        probe_set_sha256=manifest.sha256,
    )
