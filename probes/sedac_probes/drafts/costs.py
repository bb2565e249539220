"""What the parts of a draft pass cost, measured in the engine that will serve or estimated. Called by the search of a reduced draft.

L layers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sedac.errors import ConfigError
from sedac.policy.model import FULL
from sedac.probe.manifest import LevelRecord

from sedac_probes.drafts.acceptance import StepCosts
from sedac_probes.drafts.left_out import LeftOut
from sedac_probes.drafts.trial import Trial

_REMEDY = "remove it, and costs are measured again"


@dataclass(frozen=True, kw_only=True)
class PartCosts:
    """Seconds at batch 1."""

    plain: float
    """Seconds of a step without drafts."""
    verify: float
    """Seconds of a step that verifies drafts, less what each of them adds."""
    row: float
    """Seconds that each verified draft token adds."""
    base: float
    """Seconds of a draft pass without any layer: metadata, embedding, final norm, lm_head, drawing."""
    attention: float
    """Seconds of one attention, with its norm."""
    mlps: Mapping[str, float]
    """Seconds of one MLP, with its norm, by level."""

    def get(self, left_out: LeftOut, num_layers: int) -> StepCosts:
        """Return what a draft costs: the sum of its parts."""
        num_attention, num_mlp = num_layers - len(left_out.attention), num_layers - len(left_out.mlp)
        draft_pass = self.base + num_attention * self.attention + num_mlp * self.mlps[left_out.level]
        return StepCosts(plain=self.plain, verify=self.verify, row=self.row, draft_pass=draft_pass)


def read_costs(path: Path, levels: Sequence[str]) -> PartCosts:
    """Read costs from JSON: plain, verify, row, base, attention, and mlps by level, seconds.

    Raises:
        ConfigError: the file is malformed, or a level has no cost.
    """
    try:
        costs = PartCosts(**json.loads(path.read_text()))
        numbers = [costs.plain, costs.verify, costs.row, costs.base, costs.attention, *costs.mlps.values()]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} holds no costs ({error}); {_REMEDY}") from error
    if missing := sorted(set(levels) - set(costs.mlps)):
        raise ConfigError(f"{path} has no cost of an MLP at {', '.join(missing)}; add it to mlps, or {_REMEDY}")
    if not all(isinstance(n, int | float) and n >= 0 for n in numbers) or costs.plain == 0:
        raise ConfigError(f"{path} has a cost that is no number of seconds, 0 or more (plain: over 0); {_REMEDY}")
    return costs


def write_costs(path: Path, costs: PartCosts) -> None:
    """Write what `read_costs` reads."""
    path.write_text(json.dumps(asdict(costs), indent=1) + "\n")


def measure_costs(run: Callable[[LeftOut], Trial], num_layers: int, levels: Sequence[LevelRecord]) -> PartCosts:
    """Fit the costs to drafts timed in the engine: whole, without attention, without MLPs, without both, and with MLPs at a level.

    Of the levels of one reduction the most saving one is timed; those between it and `full` cost in proportion to what they save. `run`
    times one draft, each in an engine of its own, so all times are taken relative to a plain step of the same engine.
    """
    every = tuple(range(num_layers))
    kinds = {level.reduction: max((x for x in levels if x.reduction == level.reduction), key=lambda x: x.saved) for level in levels}
    extremes = sorted(kinds.values(), key=lambda level: level.name)
    tried = [LeftOut(), LeftOut(attention=every), LeftOut(mlp=every), LeftOut(attention=every, mlp=every)]
    tried += [LeftOut(attention=every, level=level.name) for level in extremes]
    timed = [StepCosts.from_trial(run(left_out)) for left_out in tried]
    names = [FULL, *(level.name for level in extremes)]
    counts = [[1, num_layers - len(t.attention), *((num_layers - len(t.mlp)) * (t.level == name) for name in names)] for t in tried]
    passes = [costs.draft_pass / costs.plain for costs in timed]
    fitted = np.linalg.lstsq(np.array(counts, dtype=float), np.array(passes), rcond=None)[0].clip(min=0)
    plain = float(np.median([costs.plain for costs in timed]))
    base, attention, *found = (fitted * plain).tolist()
    mlps = dict(zip(names, found, strict=True))
    for level in levels:
        extreme = kinds[level.reduction]
        mlps[level.name] = mlps[FULL] + (mlps[extreme.name] - mlps[FULL]) * level.saved / extreme.saved
    verify, row = (np.median([[c.verify / c.plain, c.row / c.plain] for c in timed], axis=0) * plain).tolist()
    return PartCosts(plain=plain, verify=verify, row=row, base=base, attention=attention, mlps=mlps)


def estimate_costs(config: Mapping[str, Any], levels: Sequence[LevelRecord], row_share: float) -> PartCosts:
    """Return costs in plain steps by the parameters that a pass reads; stands in where no engine is started."""
    size, heads = config["hidden_size"], config["num_attention_heads"]
    head_size = config.get("head_dim") or size // heads
    attention = size * head_size * (2 * heads + 2 * (config.get("num_key_value_heads") or heads))
    mlp, lm_head = 3 * size * config["intermediate_size"], size * config["vocab_size"]
    whole = config["num_hidden_layers"] * (attention + mlp) + lm_head
    mlps = {FULL: mlp / whole} | {level.name: mlp * (1 - level.saved) / whole for level in levels}
    return PartCosts(plain=1.0, verify=1.0, row=row_share, base=lm_head / whole, attention=attention / whole, mlps=mlps)
