"""The sections of the report page, each made of one file of the work directory; what a file holds beyond them is shown as it is.

Every function takes data that others wrote, of this or a later version: what is missing or of another form is left out, never an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sedac_probes.calibration.report import find_front
from sedac_probes.page import charts
from sedac_probes.page.blocks import (
    Details,
    Facts,
    Figure,
    HeatMap,
    Part,
    Section,
    Table,
    Text,
    as_dict,
    as_figure,
    as_list,
    as_number,
    as_percent,
    as_rows,
    as_text,
    describe,
    make_table,
)


def make_picture(path: Path, caption: str) -> tuple[Figure, ...]:
    """Embed a PNG, where it is there."""
    import base64

    if not path.is_file():
        return ()
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return (Figure(markup=Markup('<img alt="{}" src="data:image/png;base64,{}">').format(caption, data), caption=caption),)


def get_points(mechanisms: Any) -> list[charts.Point]:
    """Return every measured point of a comparison or a calibration."""
    points = []
    for mechanism, rows in as_dict(mechanisms).items():
        for row in as_rows(rows):
            saved, ratio = as_number(row.get("saved")), as_number(row.get("perplexity_ratio"))
            if saved is not None and ratio is not None and ratio > 0:
                points.append(charts.Point(mechanism=mechanism, at=str(row.get("at", "")), saved=saved, perplexity_ratio=ratio))
    return points


def make_front(points: Sequence[charts.Point], caption: str) -> Figure:
    """Draw all points and their Pareto front."""
    return Figure(
        markup=charts.draw_front(points, find_front(points)), caption=caption, legend=tuple(dict.fromkeys(point.mechanism for point in points))
    )


def make_data(collection: Part | None, num_tokens: int, used: Mapping[str, Mapping[str, Any]]) -> Section | None:
    """The texts: what was recorded, and what each later step was made from."""
    rows = []
    if collection:
        fields = {"documents": collection.take("num_documents"), "tokens": num_tokens or None, "sha256": collection.take("data_digest")}
        rows.append({"step": "collect", **fields})
    for step, data in used.items():
        digest = next((data[key] for key in ("data_digest", "data_sha256") if key in data), None)
        if digest or "num_documents" in data:
            rows.append({"step": step, "documents": data.get("num_documents"), "tokens": data.get("num_tokens"), "sha256": digest})
    if not rows:
        return None
    blocks: list[Any] = [make_table(rows, "", ("step", "documents", "tokens", "sha256"))]
    for digest in dict.fromkeys(row["sha256"] for row in rows if isinstance(row["sha256"], str)):
        steps = [row["step"] for row in rows if row["sha256"] == digest]
        if len(steps) > 1:
            blocks.append(Text(text=f"{' and '.join(steps)} took the very same texts.", kind="note"))
    if collection:
        layers = as_text(collection.take("layers"))
        blocks.append(Facts(rows=(("Checkpoints after layers", layers), ("Tokens per document at most", as_text(collection.take("max_length"))))))
        for key in ("model", "hidden_size", "num_layers", "weights_sha256"):
            collection.take(key)
        blocks += collection.get_rest()
    return Section(name="data", title="Data", blocks=tuple(blocks))


def make_model(manifest: Mapping[str, Any], collection: Part | None, certificate: Mapping[str, Any]) -> Section:
    """The model that all of it is for."""
    known = collection.data if collection else {}
    rows = {
        "Model": manifest.get("model") or known.get("model"),
        "Layers": manifest.get("num_layers") or known.get("num_layers"),
        "Hidden size": manifest.get("hidden_size") or known.get("hidden_size"),
        "Neurons per MLP": manifest.get("intermediate_size") or None,
        "Activation": manifest.get("activation") or None,
        "Weights, sha256": certificate.get("weights_sha256") or known.get("weights_sha256"),
        "Engine": certificate.get("engine"),
        "Probe set": manifest.get("name"),
        "Probe set, sha256": manifest.get("sha256"),
    }
    return Section(name="model", title="Model", blocks=(Facts(rows=tuple((k, as_text(v)) for k, v in rows.items() if v)),))


def make_probes(manifest: Mapping[str, Any], train: Part | None, picture: Path) -> Section | None:
    """The probes: what they predict and how well, on documents that training held out."""
    probes = as_rows(manifest.get("probes"))
    if not probes and not train:
        return None
    blocks: list[Any] = []
    if probes:
        blocks.append(Text(text=f"LREProbes of rank {as_text(manifest.get('rank'))} predict {as_text(manifest.get('target'))}."))
        names = list(dict.fromkeys(key for p in probes for key in as_dict(p.get("metrics"))))
        quantiles = [n for n in names if n.startswith("risk_q")]
        columns = ("layer", "threshold", "rank correlation", "Huber loss", *(f"risk at {as_percent(_get_quantile(n), 0)}" for n in quantiles))
        rows = []
        for p in probes:
            metrics = as_dict(p.get("metrics"))
            figures = [as_figure(metrics.get(n), ".3f") for n in ("spearman", "huber", *quantiles)]
            rows.append((as_text(p.get("layer")), as_figure(p.get("threshold")), *figures))
        blocks.append(Table(columns=columns, rows=tuple(rows), caption="Held-out tokens; risk at q: the risk below which the share q of them is"))
        other = [n for n in names if n not in ("spearman", "huber", *quantiles)]
        if other:
            blocks.append(make_table([{"layer": p.get("layer"), **{n: as_dict(p.get("metrics")).get(n) for n in other}} for p in probes]))
    if train:
        shown = _show_training(train)
        blocks += shown or make_picture(picture, "Training, as `sedac-probes train` drew it.")
        blocks += train.get_rest()
    return Section(name="probes", title="Probes", blocks=tuple(blocks))


def _get_quantile(name: str) -> float | None:
    try:
        return float(name.removeprefix("risk_q"))
    except ValueError:
        return None


_TRAINED = ("layer", "num_heldout_tokens", "spearman", "spearman_damage", "huber", "overconfident", "underconfident", "calibration", "losses")


def _show_training(train: Part) -> list[Any]:
    """How training went, by checkpoint: over- and under-confidence, calibration curves, the course of the loss."""
    rows = as_rows(train.take("probes"))
    train.take("probe_set")  # the digest before calibration, which writes the set anew
    if not rows:
        return []
    cells = []
    for row in rows:
        sides = (f"{as_percent(side.get('share'), 0)} by {as_figure(side.get('size'), '.3f')}" for side in _get_sides(row))
        figures = (as_figure(row.get("spearman"), ".3f"), as_figure(row.get("spearman_damage"), ".3f"), as_figure(row.get("huber")))
        cells.append((as_text(row.get("layer")), as_text(row.get("num_heldout_tokens")), *figures, *sides))
    columns = ("layer", "held-out tokens", "rank correlation", "with damage", "Huber loss", "over-confident", "under-confident")
    caption = "Training; with damage: rank correlation of risk and the measured KL of reducing the token; over-confident: risk below the target"
    blocks: list[Any] = [Table(columns=columns, rows=tuple(cells), caption=caption)]
    names = [f"layer {as_text(row.get('layer'))}" for row in rows]
    pairs = [_get_pairs(row.get("calibration")) for row in rows]
    courses = [[(float(i), y) for i, y in enumerate(map(as_number, as_list(row.get("losses"))), start=1) if y is not None] for row in rows]
    caption = "Calibration on held-out tokens: mean of the target against mean risk, by bins of risk. Dotted: perfect."
    blocks += _make_curves(names, pairs, caption, "predicted risk", "mean of the target", diagonal=True)
    blocks += _make_curves(
        names, courses, "Held-out Huber loss by epoch; the best epoch's weights are kept.", "epoch", "held-out loss", diagonal=False
    )
    more = [{"layer": row.get("layer")} | {key: value for key, value in row.items() if key not in _TRAINED} for row in rows]
    if any(len(row) > 1 for row in more):
        blocks.append(make_table(more))
    return blocks


def _get_sides(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [as_dict(row.get(key)) for key in ("overconfident", "underconfident")]


def _get_pairs(curve: Any) -> list[tuple[float, float]]:
    points = [(as_number(p.get("predicted")), as_number(p.get("observed"))) for p in as_rows(curve)]
    return [(x, y) for x, y in points if x is not None and y is not None]


def _make_curves(names: Sequence[str], curves: Sequence[Sequence[tuple[float, float]]], caption: str, x: str, y: str, *, diagonal: bool) -> list[Any]:
    found = [charts.Curve(name=name, points=tuple(points)) for name, points in zip(names, curves, strict=True) if len(points) > 1]
    if not found:
        return []
    return [Figure(markup=charts.draw_curves(found, x, y, diagonal=diagonal), caption=caption, legend=tuple(curve.name for curve in found))]


def make_validation(validation: Part | None, picture: Path) -> Section | None:
    """Thresholds and what they really cost."""
    if validation is None:
        return None
    blocks: list[Any] = [
        Text(text="Hard exits alone, with the rule applied to every token of held-out text: what each policy saves and what it costs.")
    ]
    return Section(
        name="validation",
        title="Validation",
        blocks=(*blocks, *make_picture(picture, "Validation, as `sedac-probes validate` drew it."), *_show_open(validation)),
    )


def _show_open(part: Part) -> list[Any]:
    rest = {key: value for key, value in part.data.items() if key not in part.taken}
    part.taken |= rest.keys()
    return list(describe(rest))


def make_levels(manifest: Mapping[str, Any], calibration: Part | None) -> Section | None:
    """Levels, tiers and the plan per layer."""
    levels, tiers = as_rows(manifest.get("levels")), as_rows(manifest.get("tiers"))
    if not levels and not calibration:
        return None
    about = "A level says how much of every MLP a token gets, a tier what the tokens of a request get. Measured, not certified."
    blocks: list[Any] = [Text(text=about)]
    measured: dict[str, dict[str, Any]] = {}
    if calibration:
        for mechanism, rows in as_dict(calibration.data.get("mechanisms")).items():
            for row in as_rows(rows):
                measured[f"{mechanism} {row.get('at', '')}" if mechanism.startswith("tier ") else str(row.get("at", ""))] = row
    if tiers:
        rows = []
        for tier in tiers:
            found = next((row for name, row in measured.items() if name.startswith(f"tier {tier.get('name')} ")), {})
            given = (as_text(tier.get("name")), as_text(tier.get("floor")), as_text(tier.get("level")), as_figure(tier.get("threshold_scale"), "g"))
            rows.append((*given, as_percent(found.get("saved")), as_figure(found.get("perplexity_ratio"))))
        blocks.append(
            Table(columns=("tier", "floor", "confident tokens", "threshold scale", "saved", "perplexity ratio"), rows=tuple(rows), caption="Tiers")
        )
    if levels:
        rows = []
        for level in levels:
            saved, metrics = as_number(level.get("saved")) or 0.0, as_dict(level.get("metrics"))
            figures = (as_figure(level.get("perplexity_ratio")), as_figure(metrics.get("agreement"), ".3f"), as_figure(metrics.get("kl"), ".5f"))
            rows.append((as_text(level.get("name")), charts.draw_bar(saved), as_percent(saved), *figures))
        columns = ("level", "", "saved", "perplexity ratio", "top-1 agreement", "KL, nats")
        blocks.append(Table(columns=columns, rows=tuple(rows), caption="Levels, on calibration text kept aside, every token at the level"))
    if calibration:
        blocks += _make_plan(calibration.take("plans"))
        points = get_points(calibration.take("mechanisms"))
        if points:
            blocks.append(make_front(points, "Calibration: every level, hard exits and the tiers on text kept aside. Dashed: the Pareto front."))
        for key in ("probe_set", "training"):
            calibration.take(key)
        blocks += calibration.get_rest()
    return Section(name="levels", title="Levels, tiers and plan", blocks=tuple(blocks))


def _make_plan(plans: Any) -> list[HeatMap]:
    rows = []
    for name, shares in as_dict(plans).items():
        numbers = [as_number(share) for share in shares] if isinstance(shares, list) else []
        if numbers and all(n is not None for n in numbers):
            rows.append((name, tuple(n for n in numbers if n is not None)))
    rows = [row for row in rows if len(row[1]) == len(rows[0][1])]
    rows.sort(key=lambda row: row[0].rpartition("-")[0])  # level by level of one reduction, in ascending order
    caption = "The plan: per cent of each layer's MLP FLOPs that a level saves. A layer that can't bear it stays whole."
    most = max((max(shares) for _, shares in rows), default=1.0)
    return [HeatMap(rows=tuple(rows), caption=caption, most=most or 1.0)] if rows else []


def make_comparison(comparison: Part | None) -> Section | None:
    """All mechanisms at equal saving, and the front."""
    if comparison is None:
        return None
    points, blocks = get_points(comparison.take("mechanisms")), list[Any]()
    if points:
        caption = "Held-out text, every token subject to the mechanism. Below and right is better; dashed: the Pareto front, which nothing beats."
        blocks.append(make_front(points, caption))
        rows = tuple((p.mechanism, p.at, as_percent(p.saved), as_figure(p.perplexity_ratio)) for p in find_front(points))
        columns = ("mechanism", "at", "saved", "perplexity ratio")
        front = Details(title=f"Points of the front: {len(rows)}", blocks=(Table(columns=columns, rows=rows),))
        blocks.append(front)
    equal = as_dict(comparison.take("equal_savings"))
    savings = [s for s in map(as_number, as_list(equal.get("saved"))) if s is not None]
    ratios = as_dict(equal.get("perplexity_ratio"))
    if savings and ratios:
        found = [(name, values) for name, values in ratios.items() if isinstance(values, list) and len(values) == len(savings)]
        table = tuple((name, *(as_figure(v) for v in values)) for name, values in found if any(as_number(v) is not None for v in values))
        caption = "Perplexity ratio at equal saved MLP FLOPs; -: does not reach it. What reaches none of them is left out."
        blocks.append(Table(columns=("mechanism", *(as_percent(s, 0) for s in savings)), rows=table, caption=caption))
    for key in ("data", "probe_set"):
        comparison.take(key)
    return Section(name="front", title="Mechanisms compared", blocks=(*blocks, *comparison.get_rest()))
