"""What a certification showed: as a table and one sentence, as JSON, and as a picture. Called by the command `certify`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sedac_probes.certification.certify import Certification, Observation, Outcome
from sedac_probes.certification.session import Settings

_COLOURS = {"certified": "tab:green", "passed": "tab:blue", "failed": "tab:red"}


def _describe_bound(settings: Settings) -> str:
    return f"mean {settings.loss} of at most {settings.eps:g} at {100 * (1 - settings.delta):.6g} %"


def _get_verdict(outcome: Outcome, made: Certification) -> str:
    return "certified" if outcome is made.certified else "passed" if outcome.passed else "failed"


def summarise(made: Certification) -> str:
    """Say in a sentence or two what was certified, or that nothing was and what it would take."""
    settings, chosen = made.settings, made.certified
    if chosen:
        return (
            f"certified: {chosen.member.label} has a {_describe_bound(settings)}, observed {chosen.mean_loss:.4f}, "
            f"upper limit {chosen.upper_limit:.4f}, {settings.num_requests} requests; it saves {chosen.saved:.1%} of the answers' MLP FLOPs"
        )
    first = made.outcomes[0]
    start = (
        f"none is certified: {first.member.label}, the safest, was not shown to have a {_describe_bound(settings)} ({first.mean_loss:.4f} observed)"
    )
    if first.num_needed is None:
        return f"{start}; no number of requests would do, as its own loss is not below the bound: allow a higher --eps or add a safer --member"
    return f"{start}; about {first.num_needed:,} requests with losses like these would do: --requests {first.num_needed}"


def print_outcomes(made: Certification) -> None:
    """Print one row per member in the order of the test: saved MLP FLOPs, mean loss, its upper limit, and requests that would do."""
    settings = made.settings
    title = f"{settings.num_requests} requests from {made.num_documents} documents: {_describe_bound(settings)} ({settings.procedure})"
    table = Table("member", "saved", "mean", "limit", "p-value", "verdict", "needs", title=title, box=None)
    table.columns[0].no_wrap = True
    table.add_row("exact answers", "0.0%", f"{made.exact_loss:.4f}", "-", "-", "-", "-")
    for outcome in made.outcomes:
        verdict = _get_verdict(outcome, made)
        needs = "-" if outcome.passed else "never" if outcome.num_needed is None else f"{outcome.num_needed:,}"
        figures = (f"{outcome.saved:.1%}", f"{outcome.mean_loss:.4f}", f"{outcome.upper_limit:.4f}", f"{outcome.p_value:.2g}")
        table.add_row(outcome.member.label, *figures, verdict, needs, style="bold" if verdict == "certified" else "")
    for member in made.untested:
        table.add_row(member.label, "-", "-", "-", "-", "untested", "-", style="dim")
    Console().print(table)
    _warn(settings.num_requests, made.num_documents)


def _warn(num_requests: int, num_documents: int) -> None:
    if num_documents < num_requests:
        per = num_requests / num_documents
        Console().print(
            f"{per:.1f} requests per document: those of one document are not independent, which the bounds suppose; more documents mend it"
        )


def write_json(path: Path, made: Certification) -> None:
    """Write everything that the table shows."""
    rows = [
        {**asdict(o.member), "label": o.member.label, **{k: v for k, v in asdict(o).items() if k != "member"}, "verdict": _get_verdict(o, made)}
        for o in made.outcomes
    ]
    rows += [{**asdict(m), "label": m.label, "verdict": "untested"} for m in made.untested]
    certificate = made.policy.certificate if made.policy else None
    chosen = made.certified
    written: dict[str, Any] = {
        "kind": "certify",
        "summary": summarise(made),
        "certified": chosen.member.label if chosen else None,
        "settings": asdict(made.settings),
        "num_documents": made.num_documents,
        "engine": made.engine,
        "data_sha256": made.data_sha256,
        "exact_loss": made.exact_loss,
        "members": rows,
        "certificate": asdict(certificate) if certificate else None,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(written, indent=1) + "\n")


def draw(path: Path, made: Certification) -> None:
    """Draw one row per member that was run: mean loss, upper limit, and eps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings, outcomes = made.settings, made.outcomes
    figure, axes = pyplot.subplots(figsize=(8, 1.8 + 0.32 * len(outcomes)))
    for verdict, colour in _COLOURS.items():
        rows = [i for i, outcome in enumerate(outcomes) if _get_verdict(outcome, made) == verdict]
        means, limits = [outcomes[i].mean_loss for i in rows], [outcomes[i].upper_limit for i in rows]
        if rows:  # the limit may lie below the mean, see `bounds.get_upper_limit`
            low, high = [list(map(f, means, limits)) for f in (min, max)]
            axes.hlines(rows, low, high, color=colour, linewidth=2)
            axes.plot(limits, rows, "|", color=colour, markersize=10)
            axes.plot(means, rows, "o", color=colour, label=f"{verdict}: mean, upper limit at {100 * (1 - settings.delta):.6g} %")
    axes.axvline(settings.eps, color="black", linewidth=0.9, linestyle="--", label=f"eps = {settings.eps:g}")
    axes.axvline(made.exact_loss, color="grey", linewidth=0.9, linestyle=":", label="exact answers")
    axes.set_yticks(range(len(outcomes)), [f"{o.member.label}   {o.saved:.1%} saved" for o in outcomes], fontsize=8)
    axes.invert_yaxis()
    most = max([settings.eps, *(max(o.mean_loss, o.upper_limit) for o in outcomes)])
    axes.set(xlim=(-0.02 * most, 1.1 * most), xlabel=f"{settings.loss} per request, {settings.num_requests} requests")
    chosen = made.certified
    axes.set_title(
        f"certified: {chosen.member.label}, {_describe_bound(settings)}" if chosen else f"none certified: {_describe_bound(settings)}", fontsize=9
    )
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def print_observation(seen: Observation) -> None:
    """Print the observed mean loss beside what the certificate promises."""
    c = seen.certificate
    title = f"{seen.num_requests} fresh requests from {seen.num_documents} documents, tier {c.tier}"
    table = Table("", f"mean {c.loss}", f"upper limit at {100 * (1 - c.delta):.6g} %", "FLOPs saved", title=title, box=None)
    table.add_row(f"certificate of {c.date}, {c.num_requests} requests", f"{c.mean_loss:.4f}", f"{c.upper_limit:.4f}", "-")
    table.add_row("here", f"{seen.mean_loss:.4f}", f"{seen.upper_limit:.4f}", f"{seen.saved:.1%}")
    Console().print(table)
    _warn(seen.num_requests, seen.num_documents)
    Console().print(f"observed mean {seen.mean_loss:.4f}, certified bound {c.eps:g}: {'holds' if seen.holds else 'does not hold on these requests'}")


def write_observation(path: Path, seen: Observation) -> None:
    """Write everything that `print_observation` shows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"kind": "check", **asdict(seen), "holds": seen.holds}, indent=1) + "\n")
