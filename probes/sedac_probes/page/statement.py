"""The report page's section on the certificate, in plain words, and what to do next. Called by `page`.

Like `sections`, it takes data of this or a later version: what is missing or of another form is left out, never an error.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sedac_probes.page import charts
from sedac_probes.page.blocks import (
    Commands,
    Details,
    Facts,
    Figure,
    Part,
    Section,
    Table,
    Text,
    as_dict,
    as_figure,
    as_number,
    as_percent,
    as_rows,
    as_text,
    as_title,
    describe,
)

_LOSSES = {
    "mismatch": "Mismatch: the share of an answer's tokens to which the full model prefers another.",
    "nll": "nll: the mean log-probability by which the full model's own choice exceeds the answer's token, in nats, at most 1.",
    "divergence": "Divergence: the share of positions where the answer differs from the exact one.",
}


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
        rows.append(("Put the policy into force in every engine; undo with `sedac ctl policy rollback REVISION`", apply))
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
