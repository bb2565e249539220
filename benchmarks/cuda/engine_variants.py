"""What benchmarks/cuda/engine.py measures: the engines, and one line for each variant of the policy; a new variant is a new line.

Layers are 0-based; a depth is the share of the layers up to and with the one that the checkpoint follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

BATCHES = (1, 16, 128)
DEPTHS = (0.25, 0.5, 0.75)
"""The shares of the layers after which the 7B-shaped model has its checkpoints."""
ALWAYS, NEVER = 1e30, 1e-30
"""thresholds that every token's risk is below, or none's"""
TIER = "measured"
WIDTH, CONTEXTUAL = "width-50", "contextual-50"
"""the levels of the 7B-shaped model's probe set: half the neurons in every layer"""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One process: a model, one of vLLM's model runners, and whether SEDAC is attached."""

    name: str
    model: str
    """Which model is served: demo or 7B."""
    is_v2: bool = False
    is_ours: bool = False


DEMO_V1, DEMO_V2, DEMO_SEDAC = "demo, plain V1", "demo, plain V2", "demo, SEDAC"
PLAIN_V1, PLAIN_V2, SEDAC = "7B, plain V1", "7B, plain V2", "7B, SEDAC"
ENGINES = (
    Engine(name=SEDAC, model="7B", is_ours=True),
    Engine(name=PLAIN_V2, model="7B", is_v2=True),
    Engine(name=PLAIN_V1, model="7B"),
    Engine(name=DEMO_SEDAC, model="demo", is_ours=True),
    Engine(name=DEMO_V1, model="demo"),
    Engine(name=DEMO_V2, model="demo", is_v2=True),
)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the speed table."""

    name: str
    engine: str = SEDAC
    is_telling: bool = False
    """Whether it is measured before the others."""
    enabled: bool = True
    tier: str = TIER
    exits_at: float | None = None
    """The share of the layers after which every token exits. None: no token exits."""
    floor: str = "full"
    """The level of all layers."""

    def make_policy(self, num_layers: int) -> dict[str, Any]:
        """Return the policy as `sedac_apply` takes it; empty for plain engines."""
        from sedac.policy.model import Checkpoint, Policy, Tier

        if self.engine != SEDAC:
            return {}
        shares = DEPTHS if self.exits_at is None else (self.exits_at,)
        threshold = NEVER if self.exits_at is None and self.tier == TIER else ALWAYS
        has_checkpoints = self.floor == "full"
        checkpoints = tuple(Checkpoint(layer=get_layer(s, num_layers), threshold=threshold) for s in shares if has_checkpoints)
        tier = Tier(name=TIER, floor=self.floor, level="skip" if has_checkpoints else self.floor)
        return Policy(enabled=self.enabled, checkpoints=checkpoints, tiers=(tier,), default_tier=TIER).to_dict()


def make_watching_policy(num_layers: int) -> dict[str, Any]:
    """Return a policy under which every token is decided about, prompts too, and nothing is reduced."""
    return {**Variant(name="watching").make_policy(num_layers), "phase": "all"}


VARIANTS = (
    Variant(name="plain, Model Runner V2", engine=PLAIN_V2, is_telling=True),
    Variant(name="plain, Model Runner V1", engine=PLAIN_V1, is_telling=True),
    Variant(name="attached, policy disabled", enabled=False, is_telling=True),
    Variant(name="tier exact", tier="exact", is_telling=True),
    Variant(name="skip from 50 % of the depth", exits_at=0.5, is_telling=True),
    Variant(name="skip from 25 % of the depth", exits_at=0.25),
    Variant(name="skip from 75 % of the depth", exits_at=0.75),
    Variant(name="width 50 %", floor=WIDTH),
    Variant(name="contextual 50 %", floor=CONTEXTUAL),
    Variant(name="checkpoints decide, nothing exits"),
)


def get_layer(depth: float, num_layers: int) -> int:
    """Return the checkpoint's layer at a depth; the last layer can't have one."""
    return max(0, min(num_layers - 2, round(depth * num_layers) - 1))


@dataclass(frozen=True, kw_only=True)
class Wave:
    """One timing: a variant at a batch size in one of the interleaved rounds; rounds of one phase are compared with each other."""

    variant: Variant
    batch: int
    phase: int
    round: int


def make_waves(num_rounds: int, names: tuple[str, ...]) -> Iterator[Wave]:
    """Yield all timings, the most telling first; both plain engines take part in every phase. `names`: the engines there are."""
    small, large = tuple(b for b in BATCHES if b <= 16), tuple(b for b in BATCHES if b > 16)
    plain = tuple(v for v in VARIANTS if v.engine != SEDAC)
    telling = tuple(v for v in VARIANTS if v.is_telling)
    rest = plain + tuple(v for v in VARIANTS if not v.is_telling)
    for phase, (batches, variants) in enumerate(((small, telling), (small, rest), (large, telling), (large, rest))):
        for number in range(num_rounds):
            for batch in batches:
                turn = [v for v in variants if v.engine in names]
                for variant in turn if number % 2 == 0 else reversed(turn):
                    yield Wave(variant=variant, batch=batch, phase=phase, round=number)
