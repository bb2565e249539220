"""Compare: every way of spending less on MLPs, on the same text, all tokens subject: what it saves and what it costs.

The probe set's own levels beside what they are made from (no repair, no plan), beside hard exits under each rule, tokens chosen by
chance, and the published soft exit. Thresholds sweep over the risk quantiles in the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from sedac.errors import ConfigError
from sedac.policy.model import Rule, Scope
from sedac.probe.artifact import ProbeSet
from sedac.probe.cascade import Knobs
from sedac.probe.levels import Neurons
from sedac.probe.manifest import TierRecord

from sedac_probes.calibration.forms import AtLevel, Decided, Randomly, Skip, SoftExit
from sedac_probes.calibration.reduced import Batch, Form, Plain, Quality, ReducedModel
from sedac_probes.calibration.reductions import make_level

QUANTILES = (0.02, 0.05, 0.1, 0.2, 0.4)
_UNIFORM = (0.1, 0.2, 0.3, 0.4, 0.5)
# SEDAC v6.1: three checkpoints count .3, .4, .3; here from .15 on a token is confident, since at .9 hardly one ever is.
_WEIGHTS, _TARGET = (0.3, 0.4, 0.3), 0.15
_GROUP = 8  # requests in a batch, for scope `batch`


def make_exits(probe_set: ProbeSet) -> dict[str, dict[str, Decided]]:
    """Return the forms that skip all MLPs above a checkpoint, per mechanism and risk quantile."""
    records = probe_set.manifest.probes

    def at(quantile: float, rule: Rule = "first", scope: Scope = "token", kind: type[Decided] = Decided) -> Decided:
        """Return the form whose thresholds are this quantile of the risks."""
        weights = _WEIGHTS if len(records) == len(_WEIGHTS) else (1 / len(records),) * len(records)
        knobs = {
            p.layer: Knobs(threshold=p.metrics[f"risk_q{quantile}"], rule=rule, scope=scope, weight=w, target=_TARGET)
            for p, w in zip(records, weights, strict=True)
        }
        if rule == "single":  # the first checkpoint, which saves most
            knobs = dict(list(knobs.items())[:1])
        return kind(probe_set.probes, knobs)

    if any(f"risk_q{q}" not in p.metrics for p in records for q in QUANTILES):
        raise ConfigError(f"probe set {probe_set.manifest.name} does not say its probes' risk quantiles; train it with `sedac-probes train`")
    names = {q: f"risk below {q:.0%} quantile" for q in QUANTILES}
    first = {name: at(q) for q, name in names.items()}
    return {
        "hard exit, first": first,
        "hard exit, single": {name: at(q, "single") for q, name in names.items()},
        "hard exit, accumulate": {name: at(q, "accumulate") for q, name in names.items()},
        f"hard exit, first, batch of {_GROUP}": {name: at(q, "first", "batch") for q, name in names.items()},
        "hard exit, random tokens": {f"as often as {name}": Randomly(like) for name, like in first.items()},
        "soft exit as published (v6.1)": {name: at(q, "accumulate", kind=SoftExit) for q, name in names.items()},
    }


def make_reductions(model: ReducedModel, probe_set: ProbeSet, calibration: Sequence[Batch]) -> dict[str, dict[str, Form]]:
    """Return the forms that give every token a reduced level, per mechanism; `calibration` text sets the uniform thresholds."""
    manifest, activation = probe_set.manifest, model.activation
    score = manifest.score
    if score not in ("gate", "activation") or not probe_set.levels:
        raise ConfigError(f"probe set {manifest.name} has no levels; make them with `sedac-probes calibrate`")
    own = {layer: replace(known, repair_FD=None) for layer, known in probe_set.neurons.items()}

    def at(reduction: str, neurons: Mapping[int, Neurons]) -> dict[str, Form]:
        """Return the forms of all levels of one reduction, by name."""
        return {level.name: AtLevel(level, neurons, activation, score) for level in probe_set.levels if level.reduction == reduction}  # type: ignore[arg-type]

    uniform: dict[str, Form] = {}
    for saved in _UNIFORM:
        level = make_level(model, calibration, "uniform", "contextual", [saved] * model.num_layers, own, score)  # type: ignore[arg-type]
        uniform[f"{1 - 1.5 * saved:.0%} of neurons in every layer"] = AtLevel(level, own, activation, score)  # type: ignore[arg-type]
    named: dict[str, Form] = {"full": Plain(), "skip": Skip(), **at("width", probe_set.neurons), **at("contextual", probe_set.neurons)}

    def make_tier(tier: TierRecord) -> Form:
        """Return the form of a tier that the set's author proposes."""
        knobs = {p.layer: Knobs(threshold=p.threshold * tier.threshold_scale) for p in manifest.probes}
        return Decided(probe_set.probes, knobs, floor=named[tier.floor], level=named[tier.level])

    made = {
        "width, plan": at("width", own),
        "width, plan, repair": at("width", probe_set.neurons),
        "contextual, same share everywhere": uniform,
        "contextual, plan": at("contextual", own),
        "contextual, plan, repair": at("contextual", probe_set.neurons),
        "tiers of the set": {f"{tier.name}: {tier.floor}, {tier.level}": make_tier(tier) for tier in manifest.tiers},
    }
    return {mechanism: forms for mechanism, forms in made.items() if forms}


def compare(
    model: ReducedModel, probe_set: ProbeSet, texts: Sequence[str], calibration_texts: Sequence[str], *, max_length: int = 512
) -> dict[str, list[tuple[str, Quality]]]:
    """Measure every mechanism at every strength on `texts`.

    Raises:
        ConfigError: the probe set has no levels, or its manifest lacks risk quantiles.
    """
    batches = model.make_batches(texts, max_length=max_length, batch_size=_GROUP)
    calibration = model.make_batches(calibration_texts, max_length=max_length)
    exits = make_exits(probe_set)
    random = {name: exits.pop(name) for name in list(exits) if "random" in name}
    result: dict[str, list[tuple[str, Quality]]] = {}
    # Random tokens last: their rates are those that the rule has shown.
    for part in (exits, random, make_reductions(model, probe_set, calibration)):
        rows = [(mechanism, variant, form) for mechanism, forms in part.items() for variant, form in forms.items()]
        for (mechanism, variant, _), quality in zip(rows, model.measure(batches, [form for *_, form in rows], "compare"), strict=True):
            result.setdefault(mechanism, []).append((variant, quality))
    return result
