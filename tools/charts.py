"""The charts of `mls report`: from logged rows to curves, ticks and SVG paths. Pure geometry, report.html draws it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mls.tools.report import Card

WIDTH, HEIGHT = 360, 190  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 44, WIDTH - 10, 8, HEIGHT - 34  # edges of the plot: room around it for ticks
MOST_POINTS = 240  # of a curve; more cannot be told apart
FEW_POINTS = 12  # so few are shown as dots, too
COLOURS = 6
KINDS = ("", "second", "third")  # curves of one run in one chart, told apart by their dashes

Point = tuple[float, float | None]  # None: not finite, the curve has a gap


@dataclass(frozen=True)
class Curve:
    run: int
    kind: int  # which of the chart's metrics
    label: str
    points: list[Point]
    averaged: int  # logged values behind one point


def chart(
    cards: Sequence[Card],
    title: str,
    note: str,
    curves: Mapping[str, str],
    low: float | None = None,
    high: float | None = None,
    log: bool = False,
) -> dict[str, Any] | None:
    """The geometry of one chart, or None where no run has logged any of its metrics.

    `curves` maps labels to metrics; the label "chance" marks a reference. The value axis reaches to `low` and `high`.
    """
    found = list(_curves(cards, curves, log))
    if not found:
        return None
    values = [value for curve in found for _, value in curve.points if value is not None]
    bottom, top = _axis(values, low, high)
    y_ticks = _log_ticks(bottom, top) if log else _ticks(bottom, top, 4)
    last_step = max(1, *(row["step"] for card in cards for row in card.rows))
    x = lambda step: round(LEFT + (RIGHT - LEFT) * step / last_step, 1)
    y = lambda value: round(BOTTOM - (BOTTOM - TOP) * (value - bottom) / (top - bottom), 1)
    lines = []
    for curve in found:
        placed = [None if value is None else (x(step), y(value)) for step, value in curve.points]
        dots = [place for place in placed if place] if len(placed) <= FEW_POINTS else []
        label = f"{cards[curve.run].label}: {curve.label}" if len(cards) > 1 else curve.label
        lines.append({"css": _css_classes(curve, len(cards)), "label": label, "path": _path(placed), "dots": dots})
    return {
        "title": title,
        "note": note,
        "lines": lines,
        "x_ticks": [(x(step), _short(step)) for step in _ticks(0, last_step, 5)],
        "y_ticks": [(y(value), f"{10**value:.3g}" if log else f"{value:,.6g}") for value in y_ticks],
        "summary": "; ".join(_in_words(curve, line["label"], log) for curve, line in zip(found, lines, strict=True)),
        "averaged": max(curve.averaged for curve in found),
        **{"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "bottom": BOTTOM},
    }


def _curves(cards: Sequence[Card], metrics: Mapping[str, str], log: bool) -> Iterator[Curve]:
    for run, card in enumerate(cards):
        for kind, (label, metric) in enumerate(metrics.items()):
            points: list[Point] = [(row["step"], row[metric]) for row in card.rows if metric in row]
            if log:
                points = [(step, math.log10(value) if value and value > 0 else None) for step, value in points]
            if any(value is not None for _, value in points):
                averaged = math.ceil(len(points) / MOST_POINTS)
                yield Curve(run, kind, label, _means(points, averaged), averaged)


def _means(points: Sequence[Point], count: int) -> list[Point]:
    """Each `count` points in a row as one, at their last step.

    >>> _means([(1, 2.0), (2, 4.0), (3, None)], 2)
    [(2, 3.0), (3, None)]
    """
    parts = [points[start : start + count] for start in range(0, len(points), count)]
    known = [[value for _, value in part if value is not None] for part in parts]
    return [(part[-1][0], sum(v) / len(v) if v else None) for part, v in zip(parts, known, strict=True)]


def _axis(values: Sequence[float], low: float | None, high: float | None) -> tuple[float, float]:
    """Where the value axis begins and ends."""
    bottom = min(values) if low is None else min(low, *values)
    top = max(values) if high is None else max(high, *values)
    if top - bottom < 1e-9 * max(abs(top), 1e-3):  # a constant lies in the middle
        half = abs(top) / 10 or 1.0
        bottom, top = (bottom if low == bottom else bottom - half), top + half
    room = 0.05 * (top - bottom)
    return (bottom if bottom == low else bottom - room), (top if top == high else top + room)


def _ticks(low: float, high: float, most: int) -> list[float]:
    """About `most` round numbers from low to high.

    >>> _ticks(0, 96, 5), _ticks(-0.1, 1.02, 4)
    ([0.0, 20.0, 40.0, 60.0, 80.0], [0.0, 0.25, 0.5, 0.75, 1.0])
    """
    size = 10.0 ** math.floor(math.log10((high - low) / most))
    width = next(size * factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (size * factor) <= most + 0.5)
    first, last = math.ceil(low / width - 1e-9), math.floor(high / width + 1e-9)
    return [number * width + 0.0 for number in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Decades, as exponents of ten; 1, 2 and 5 of each where they are few.

    >>> [round(10**tick, 3) for tick in _log_ticks(-1.2, 0.1)]
    [0.1, 0.2, 0.5, 1.0]
    """
    decades = range(math.floor(low), math.ceil(high) + 1)
    factors = (1, 2, 5) if high - low < 2 else (1,)
    ticks = [decade + math.log10(factor) for decade in decades[:: math.ceil(len(decades) / 6)] for factor in factors]
    inside = [tick for tick in ticks if low <= tick <= high]
    return inside if len(inside) > 1 else _ticks(low, high, 4)


def _short(step: float) -> str:
    """
    >>> _short(800), _short(2500), _short(120000)
    ('800', '2.5k', '120k')
    """
    return f"{step / 1000:g}k" if step >= 1000 else f"{step:g}"


def _css_classes(curve: Curve, runs: int) -> str:
    """CSS classes: one run's metrics differ by colour and dashes, several runs by colour, their metrics by dashes."""
    chance = curve.label == "chance"
    dashes = "chance" if chance else KINDS[curve.kind]
    colour = f"c{curve.run % COLOURS}" if runs > 1 else "soft" if chance else f"c{curve.kind}"
    return f"{colour} {dashes}".strip()


def _path(places: Sequence[tuple[float, float] | None]) -> str:
    """SVG's path: a value that is missing leaves a gap, one that stands alone is a dot."""
    parts, pen_up = [], True
    for place in places:
        if place is not None:
            parts.append(f"M{place[0]:g} {place[1]:g}h0" if pen_up else f"L{place[0]:g} {place[1]:g}")
        pen_up = place is None
    return "".join(parts)


def _in_words(curve: Curve, label: str, log: bool) -> str:
    known = [(step, 10**value if log else value) for step, value in curve.points if value is not None]
    (first, start), (last, end) = known[0], known[-1]
    return f"{label}: {start:.4g} at step {first:,}" + (f", {end:.4g} at step {last:,}" if last > first else "")
