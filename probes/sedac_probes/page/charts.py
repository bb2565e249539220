"""The report page's charts as inline SVG: drawn from the JSON files, in colours that stand on light and on dark paper, without scripts.

Every function returns markup that is safe to embed: all text in it is escaped. Text and rules take the page's own colour. Called by `sections`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

_COLOURS = ("#4e79a7", "#e8862e", "#59a14f", "#d64550", "#2fa5a0", "#b07aa1", "#9c755f", "#c9a227", "#6f7bd9", "#d37295", "#86a032", "#7f8790")
_VERDICTS = {"certified": "#2e9e4f", "passed": "#4e79a7", "failed": "#d64550"}
_STYLES = {
    "grid": 'stroke="currentColor" stroke-opacity="0.14"',
    "front": 'fill="none" stroke="currentColor" stroke-dasharray="5 4"',
    "limit": 'stroke="currentColor" stroke-width="1.5" stroke-dasharray="6 4"',
    "guide": 'stroke="currentColor" stroke-opacity="0.6" stroke-dasharray="2 3"',
}
_WIDTH = 760
_FLOOR = 0.01  # percent: what the log axis shows for no increase at all


@dataclass(frozen=True, kw_only=True)
class Point:
    """One variant of one mechanism."""

    mechanism: str
    at: str
    saved: float
    """Share of MLP FLOPs saved."""
    perplexity_ratio: float


@dataclass(frozen=True, kw_only=True)
class Interval:
    """One tested member of a certification's family."""

    label: str
    mean: float
    upper_limit: float
    verdict: str
    """One of certified, passed and failed."""
    note: str = ""
    """Text beside the row, such as what it saves."""


def _text(x: float, y: float, text: str, anchor: str = "middle", *, soft: bool = False, bold: bool = False) -> Markup:
    look = (' fill-opacity="0.7"' if soft else "") + (' font-weight="700"' if bold else "")
    tag = f'<text x="{{:.1f}}" y="{{:.1f}}" text-anchor="{{}}" fill="currentColor"{look}>{{}}</text>'
    return Markup(tag).format(x, y, anchor, text)


def _upright(y: float, text: str) -> Markup:
    tag = '<text transform="translate(13 {:.0f}) rotate(-90)" text-anchor="middle" fill="currentColor" fill-opacity="0.7">{}</text>'
    return Markup(tag).format(y, text)


def _line(x0: float, y0: float, x1: float, y1: float, style: str) -> Markup:
    return Markup(f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" {_STYLES[style]}/>')


def _stroke(x0: float, y0: float, x1: float, y1: float, colour: str) -> Markup:
    return Markup(f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="{colour}" stroke-width="2"/>')


def _trace(points: Sequence[tuple[float, float]], style: str) -> Markup:
    return Markup(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" {style}/>')


def _get_colour(series: int) -> str:
    return _COLOURS[series % len(_COLOURS)]


def _get_trace_style(series: int) -> str:
    return f'fill="none" stroke="{_get_colour(series)}" stroke-width="1.5"'


def _mark(x: float, y: float, series: int, title: str) -> Markup:
    """A circle, square, diamond or triangle: series that share a colour differ in shape."""
    shape = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"',
        f'<path d="M{x:.1f} {y:.1f}m-4 -4h8v8h-8z"',
        f'<path d="M{x:.1f} {y:.1f}m0 -5.5l5.5 5.5l-5.5 5.5l-5.5 -5.5z"',
        f'<path d="M{x:.1f} {y:.1f}m0 -5l5 9h-10z"',
    )[(series + series // len(_COLOURS)) % 4]
    return Markup(f'{shape} fill="{_get_colour(series)}"><title>{{}}</title></{shape[1 : shape.index(" ")]}>').format(title)


def _frame(height: float, body: Sequence[Markup], label: str) -> Markup:
    return Markup('<svg viewBox="0 0 {} {:.0f}" font-size="12" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, height, label, Markup("").join(body)
    )


def draw_key(series: int) -> Markup:
    """Return the marker of a series for a legend."""
    return Markup('<svg viewBox="-8 -8 16 16" class="key" aria-hidden="true">{}</svg>').format(_mark(0, 0, series, ""))


def _get_step(span: float, most: int) -> float:
    """Return the round step (1, 2, 2.5 or 5 times a power of ten) that cuts `span` into at most `most` parts."""
    power = 10 ** math.floor(math.log10(span / most))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if span / (factor * power) <= most)


def draw_front(points: Sequence[Point], front: Sequence[Point]) -> Markup:
    """Draw the perplexity increase (log) against saved MLP FLOPs, one line per mechanism, the Pareto front dashed."""
    height, left, right, top, bottom = 440, 64, 16, 14, 48
    width, tall = _WIDTH - left - right, height - top - bottom

    def raise_(ratio: float) -> float:
        """Return the increase of perplexity in percent, or the least that the axis shows."""
        return max(_FLOOR, ratio * 100 - 100)

    most = max(0.05, *(p.saved for p in points)) * 100 * 1.04
    high = math.ceil(math.log10(max(1.0, *(raise_(p.perplexity_ratio) for p in points))) * 2 + 0.05) / 2
    low = math.log10(_FLOOR)

    def x_of(saved: float) -> float:
        """Return the horizontal position of a saving."""
        return left + saved * 100 / most * width

    def y_of(ratio: float) -> float:
        """Return the vertical position of a perplexity ratio."""
        return top + (high - math.log10(raise_(ratio))) / (high - low) * tall

    body = []
    for power in range(int(low), math.floor(high) + 1):
        for factor in (1, 3):
            if math.log10(factor) + power <= high:
                percent = factor * 10.0**power
                y = y_of(1 + percent / 100)
                body += [
                    _line(left, y, _WIDTH - right, y, "grid"),
                    _text(left - 8, y + 4, ("≤ " if (power, factor) == (int(low), 1) else "") + f"{percent:g} %", "end"),
                ]
    step = _get_step(most, 8)
    for i in range(int(most / step) + 1):
        x = x_of(i * step / 100)
        body += [_line(x, top, x, height - bottom, "grid"), _text(x, height - bottom + 18, f"{i * step:g} %")]
    body += [_text(left + width / 2, height - 8, "MLP FLOPs saved", soft=True)]
    body.append(_upright(top + tall / 2, "perplexity increase"))
    body += [_trace([(x_of(p.saved), y_of(p.perplexity_ratio)) for p in front], _STYLES["front"])] if len(front) > 1 else []
    for series, mechanism in enumerate(dict.fromkeys(p.mechanism for p in points)):
        own = sorted((p for p in points if p.mechanism == mechanism), key=lambda p: p.saved)
        if len(own) > 1:
            body.append(_trace([(x_of(p.saved), y_of(p.perplexity_ratio)) for p in own], _get_trace_style(series)))
        for p in own:
            title = f"{p.mechanism}, {p.at}: {p.saved:.1%} saved at {p.perplexity_ratio:.4f}"
            body.append(_mark(x_of(p.saved), y_of(p.perplexity_ratio), series, title))
    return _frame(height, body, "Perplexity increase against saved MLP FLOPs, by mechanism")


def draw_intervals(rows: Sequence[Interval], eps: float, exact: float | None, axis: str) -> Markup:
    """Draw mean and upper limit of every tested member, one row each, and eps as the line that they must not cross."""
    row, left, right, top = 26, 310, 74, 24
    width, foot = _WIDTH - left - right, top + row * len(rows)
    most = max(eps, *(max(r.mean, r.upper_limit) for r in rows)) * 1.12

    def x_of(loss: float) -> float:
        """Return the horizontal position of a loss."""
        return left + loss / most * width

    body: list[Markup] = []
    step = _get_step(most, 6)
    for i in range(int(most / step) + 1):
        body += [_line(x_of(i * step), top, x_of(i * step), foot, "grid"), _text(x_of(i * step), foot + 18, f"{i * step:.4g}")]
    if exact is not None and exact > 0:
        body.append(_line(x_of(exact), top, x_of(exact), foot, "guide"))
    for i, r in enumerate(rows):
        y = top + row * (i + 0.5)
        colour, x_limit = _VERDICTS.get(r.verdict, _VERDICTS["passed"]), x_of(r.upper_limit)
        low, high = sorted((r.mean, r.upper_limit))
        body += [_text(left - 10, y + 4, r.label if len(r.label) < 37 else f"{r.label[:35]}…", "end", bold=r.verdict == "certified")]
        body += [
            _stroke(x_of(low), y, x_of(high), y, colour),
            _stroke(x_limit, y - 6, x_limit, y + 6, colour),
        ]
        title = f"{r.label}: mean {r.mean:.4f}, upper limit {r.upper_limit:.4f}"
        body.append(Markup(f'<circle cx="{x_of(r.mean):.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"><title>{{}}</title></circle>').format(title))
        body += [_text(_WIDTH - right + 10, y + 4, r.note, "start")]
    body += [_line(x_of(eps), top - 4, x_of(eps), foot, "limit"), _text(x_of(eps), top - 10, f"eps = {eps:g}", soft=True)]
    body += [_text(left + width / 2, foot + 38, axis, soft=True), _text(_WIDTH - right + 10, top - 10, "saved", "start", soft=True)]
    return _frame(foot + 46, body, "Mean loss and upper limit of every tested policy")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line of a small chart."""

    name: str
    points: tuple[tuple[float, float], ...]


def draw_curves(curves: Sequence[Curve], x_label: str, y_label: str, *, diagonal: bool) -> Markup:
    """Draw lines in one square-ish chart from 0 on, with the diagonal where both axes have one unit."""
    height, left, right, top, bottom = 340, 58, 16, 12, 46
    width, tall = _WIDTH - left - right, height - top - bottom
    xs, ys = ([p[axis] for curve in curves for p in curve.points] for axis in (0, 1))
    most_x, most_y = max(1e-9, *xs) * 1.04, max(1e-9, *ys) * 1.06

    def scale(most: float, start: float, span: float) -> Callable[[float], float]:
        """Return the function that maps values to positions on an axis."""
        return lambda value: start + value / most * span

    x_of, y_of = scale(most_x, left, width), scale(most_y, top + tall, -tall)
    body: list[Markup] = []
    for i in range(int(most_x / _get_step(most_x, 8)) + 1):
        x = i * _get_step(most_x, 8)
        body += [_line(x_of(x), top, x_of(x), top + tall, "grid"), _text(x_of(x), top + tall + 18, f"{x:.3g}")]
    for i in range(int(most_y / _get_step(most_y, 6)) + 1):
        y = i * _get_step(most_y, 6)
        body += [_line(left, y_of(y), _WIDTH - right, y_of(y), "grid"), _text(left - 8, y_of(y) + 4, f"{y:.3g}", "end")]
    if diagonal:
        end = min(most_x, most_y)
        body.append(_line(x_of(0), y_of(0), x_of(end), y_of(end), "guide"))
    for series, curve in enumerate(curves):
        line = [(x_of(x), y_of(y)) for x, y in curve.points]
        body.append(_trace(line, _get_trace_style(series)))
        body += [_mark(x, y, series, f"{curve.name}: {px:.4g}, {py:.4g}") for (x, y), (px, py) in zip(line, curve.points, strict=True)]
    body += [_text(left + width / 2, height - 8, x_label, soft=True)]
    body.append(_upright(top + tall / 2, y_label))
    return _frame(height, body, f"{y_label} against {x_label}")


def draw_bar(share: float) -> Markup:
    """Return a bar for a table's cell; `share` 0 to 1."""
    return Markup('<span class="bar" aria-hidden="true"><i style="width:{:.1f}%"></i></span>').format(min(1.0, max(0.0, share)) * 100)
