"""The sections of the report page, each made of one file of the work directory; what a file holds beyond them is shown as it is.

Every function takes data that others wrote, of this or a later version: what is missing or of another form is left out, never an error.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sedac_probes import charts
from sedac_probes.blocks import (
    Commands,
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
    as_title,
    describe,
    make_table,
)
from sedac_probes.report import find_front

_LOSSES = {
    "mismatch": "Mismatch: the share of an answer's tokens to which the full model prefers another.",
    "nll": "nll: the mean log-probability by which the full model's own choice exceeds the answer's token, in nats, at most 1.",
    "divergence": "Divergence: the share of positions where the answer differs from the exact one.",
}


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
        for key in ("model", "hidden_size", "num_layers"):
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
        "Weights, sha256": certificate.get("weights_sha256"),
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
        blocks += _find_curves(train)
    blocks += make_picture(picture, "Training, as `sedac-probes train` drew it.")
    if train:
        blocks += train.get_rest()
    return Section(name="probes", title="Probes", blocks=tuple(blocks))


def _get_quantile(name: str) -> float | None:
    try:
        return float(name.removeprefix("risk_q"))
    except ValueError:
        return None


def _find_curves(train: Part) -> list[Any]:
    """Draw the calibration curves, where the file has them as pairs per layer."""
    curves = []
    for row in as_rows(train.data.get("probes") or train.data.get("layers")):
        for key, value in row.items():
            if "calibration" not in key or not isinstance(value, list):
                continue
            pairs = [tuple(v.values())[:2] if isinstance(v, dict) else tuple(v)[:2] if isinstance(v, list) else () for v in value]
            good = [(x, y) for x, y in ((as_number(p[0]), as_number(p[1])) for p in pairs if len(p) == 2) if x is not None and y is not None]
            if len(good) > 1:
                curves.append(charts.Curve(name=f"layer {row.get('layer')}", points=tuple(good)))
    if not curves:
        return []
    caption = "Calibration on held-out tokens: the mean of what came out against the mean risk, by bins of risk. Dotted: perfect."
    chart = charts.draw_curves(curves, "predicted risk", "mean of the target", diagonal=True)
    return [Figure(markup=chart, caption=caption, legend=tuple(curve.name for curve in curves))]


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
    points, blocks = get_points(comparison.take("mechanisms")), []
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
        rows = tuple((name, *(as_figure(v) for v in values)) for name, values in found if any(as_number(v) is not None for v in values))
        caption = "Perplexity ratio at equal saved MLP FLOPs; -: does not reach it. What reaches none of them is left out."
        blocks.append(Table(columns=("mechanism", *(as_percent(s, 0) for s in savings)), rows=rows, caption=caption))
    for key in ("data", "probe_set"):
        comparison.take(key)
    return Section(name="front", title="Mechanisms compared", blocks=(*blocks, *comparison.get_rest()))


def state(certification: Part) -> str:
    """Say in plain words what was shown."""
    settings = as_dict(certification.data.get("settings"))
    loss, eps, delta = str(settings.get("loss", "loss")), as_number(settings.get("eps")), as_number(settings.get("delta"))
    if eps is None or delta is None:
        return _sum_up(certification.data.get("summary")) or "The file has no settings."
    like = f"requests like the {as_text(settings.get('num_requests'))} tested"
    asked = f"the expected {loss} is at most {eps:g}, with confidence {100 - 100 * delta:.6g} %. {_LOSSES.get(loss, '')}".strip()
    if certification.data.get("certificate"):
        return f"Of {like}, {asked}"
    return f"It was not shown of any policy that of {like}, {asked}"


def make_certificate(certification: Part | None, check: Part | None) -> Section | None:
    """The whole test: every member of the family, and what it showed."""
    if certification is None:
        return None
    settings, certificate = as_dict(certification.take("settings")), as_dict(certification.take("certificate"))
    blocks: list[Any] = [Text(text=_sum_up(certification.take("summary")))]
    if certificate:
        tier = as_text(certificate.get("tier"))
        about = f"It holds for requests drawn as these were, independently, answered under the tier `{tier}` of the policy; "
        blocks.append(Text(text=about + "for this model, this probe set and these knobs alone. It says nothing of a single request."))
    members, chosen = as_rows(certification.take("members")), certification.take("certified")
    eps, exact = as_number(settings.get("eps")), as_number(certification.take("exact_loss"))
    rows, intervals = [], []
    for member in members:
        label, verdict = as_text(member.get("label", "")), as_text(member.get("verdict", "-"))
        mean, limit = as_number(member.get("mean_loss")), as_number(member.get("upper_limit"))
        figures = (as_percent(member.get("saved")), as_figure(mean), as_figure(limit), as_figure(member.get("p_value"), ".2g"))
        needed = "-" if verdict != "failed" else as_text(member["num_needed"]) if member.get("num_needed") else "no number"
        rows.append((label, *figures, verdict, needed))
        if mean is not None and limit is not None:
            saved = as_percent(member.get("saved"))
            intervals.append(charts.Interval(label=str(label), mean=mean, upper_limit=limit, verdict=str(verdict), note=saved))
    if intervals and eps:
        caption = "Mean loss (dot) and upper limit (bar), tested from the safest down until one fails; the last that passes is certified."
        caption += " Dotted: the loss of the exact answers themselves, by rounding." if exact else ""
        blocks.append(Figure(markup=charts.draw_intervals(intervals, eps, exact, f"{settings.get('loss', 'loss')} per request"), caption=caption))
    if rows:
        marked = frozenset(i for i, member in enumerate(members) if chosen and member.get("label") == chosen)
        columns = ("policy", "saved", "mean loss", "upper limit", "p-value", "verdict", "requests needed")
        blocks.append(Table(columns=columns, rows=tuple(rows), caption="The family, in the order of the test", marked=marked))
    for title, fields in (("The certificate, field by field", certificate), ("Settings of the test", settings)):
        if fields:
            blocks.append(Details(title=title, blocks=(Facts(rows=tuple((as_title(k), as_text(v)) for k, v in fields.items())),)))
    if check:
        holds, observed = check.data.get("holds"), as_figure(check.data.get("mean_loss"))
        fresh = f"On {as_text(check.data.get('num_requests'))} fresh requests the mean loss was {observed}: the bound "
        blocks.append(Text(text=fresh + ("held." if holds else "did not hold."), kind="note" if holds else "warning"))
        blocks.append(Details(title=f"All fields of {check.name}", blocks=tuple(describe(check.data))))
    return Section(name="certificate", title="Certificate", blocks=(*blocks, *certification.get_rest()))


def _sum_up(summary: Any) -> str:
    text = str(as_text(summary)) if summary else ""
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") or not text else ".")


def make_next(work: Path, model: str, probe_set: Path, missing: Sequence[tuple[str, str]], certification: Part | None) -> Section:
    """What to do next: what is missing, and the commands that put the policy into force."""
    rows: list[tuple[str, str]] = [(f"Missing: {what}", command) for what, command in missing]
    policy, blocks = work / "policy.json", list[Any]()
    if policy.is_file():
        apply = f"sedac ctl policy apply {shlex.quote(str(policy))} --wait 5"
        rows.append(("Serve the model with this probe set", f"sedac serve {shlex.quote(model)} --probe-set {shlex.quote(str(probe_set))}"))
        rows.append(("Put the policy into force in every engine; undo with `sedac ctl policy rollback`", apply))
        certified = certification and certification.data.get("certificate")
        blocks.append(
            Text(text="The policy is certified for this model, these probes and these knobs. Applied to others it is refused.")
            if certified
            else Text(text="The policy in this directory carries no certificate that this report knows.", kind="warning")
        )
    elif certification:
        blocks.append(Text(text=f"No policy to apply. {_sum_up(certification.data.get('summary'))}", kind="warning"))
    if policy.is_file() and certification and certification.data.get("certificate"):
        check = f"sedac-probes certify --check {shlex.quote(str(policy))} --texts OTHER_TRAFFIC.txt --out {shlex.quote(str(work))}"
        rows.append(("Hold the certificate against requests that had no part in it", check))
    return Section(name="next", title="What to do next", blocks=(*blocks, Commands(rows=tuple(rows))) if rows else tuple(blocks))


def get_best_saving(certification: Part | None) -> float | None:
    """Return what the certified member saves."""
    if certification is None or not certification.data.get("certified"):
        return None
    members = as_rows(certification.data.get("members"))
    found = [as_number(m.get("saved")) for m in members if m.get("label") == certification.data["certified"]]
    return next((saved for saved in found if saved is not None), None)
