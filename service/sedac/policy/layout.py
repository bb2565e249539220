"""What an engine has attached, and whether it can load a probe set while it runs; for the control service, the agent and the worker."""

from __future__ import annotations

from dataclasses import dataclass

from sedac.policy.model import FULL, SKIP

_RESTART = "restart the engine with it (SEDAC_PROBE_DIR)"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What an engine has attached; a policy may only name these."""

    num_layers: int
    hidden_size: int
    checkpoint_layers: tuple[int, ...]
    probe_set: str
    levels: tuple[str, ...] = (FULL, SKIP)
    weights_sha256: str = ""
    """Digest of the model's weights, see sedac.policy.weights. If empty, it is unknown, so that no certificate can be checked."""
    probe_set_sha256: str = ""
    """Digest of the probe set's weights. If empty, it is unknown."""
    max_rank: int = 0
    """Largest rank of probes that can be loaded without a restart. 0 means that none can."""
    levels_sha256: str = ""
    """Digest of the reduced levels attached, see sedac.probe.verify. If empty, there are none."""
    draft: str = ""
    """Kind of the engine's own draft, see sedac.probe.draft_manifest. If empty, there is none."""
    max_draft_tokens: int = 0
    """Limit of draft tokens of one sequence per step, fixed at the start. 0 means no draft."""


@dataclass(frozen=True, kw_only=True)
class ProbeSetSummary:
    """What decides about a verified probe set: who can load it, and which certificates speak of it."""

    name: str
    sha256: str
    """Digest of the weights."""
    size_bytes: int
    """Size of the weights."""
    num_layers: int
    hidden_size: int
    rank: int
    checkpoint_layers: tuple[int, ...]
    levels_sha256: str = ""
    """Digest of the set's reduced levels, see sedac.probe.verify. If empty, it has none."""


def find_fit_problem(probe_set: ProbeSetSummary, layout: Layout) -> str:
    """Return why an engine can't load a set without a restart, and the remedy; empty: it can.

    Probes are swapped in place: same model size, layers among those attached, rank up to the attached maximum. Levels are not: a set has
    none of its own, so that the attached ones stay, or exactly those.
    """
    if probe_set.name == layout.probe_set:
        if probe_set.sha256 == layout.probe_set_sha256:
            return ""
        digests = f"{layout.probe_set_sha256[:12] or 'unknown'}..., this one has {probe_set.sha256[:12]}..."
        return f"the engine started with another set of that name (sha256 {digests}); upload it under another name"
    for name in ("hidden_size", "num_layers"):
        made, has = getattr(probe_set, name), getattr(layout, name)
        if made != has:
            return f"it is made for {name} {made}, the model has {has}; train a set for this model"
    attached = ", ".join(map(str, layout.checkpoint_layers)) or "none"
    foreign = [layer for layer in probe_set.checkpoint_layers if layer not in layout.checkpoint_layers]
    if foreign:
        return f"it has a probe for layer {foreign[0]}, attached are {attached}; {_RESTART}, or train it for the attached layers"
    if probe_set.rank > layout.max_rank:
        return f"its rank {probe_set.rank} is over {layout.max_rank}, the most that is attached; {_RESTART}, or train a smaller one"
    if probe_set.levels_sha256 not in ("", layout.levels_sha256):
        has = f"{layout.levels_sha256[:12]}..." if layout.levels_sha256 else "none"
        return f"its reduced levels ({probe_set.levels_sha256[:12]}...) are not those attached ({has}); {_RESTART}, or leave its levels out"
    return ""


def find_certified_digest(probe_set: ProbeSetSummary, layout: Layout) -> str:
    """Return the digest that a certificate must state where an engine serves a set that fits it; empty: none can.

    Probes without levels, beside the levels of the set that the engine started with, are a combination that has no digest of its own.
    """
    return probe_set.sha256 if probe_set.levels_sha256 or not layout.levels_sha256 or probe_set.name == layout.probe_set else ""
