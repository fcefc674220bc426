"""`mls report`: one offline page about one or more runs. Words and looks are in report.html, the crops come from
mls/gallery.py, the numbers from metrics.jsonl and nowhere else."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mls.config import Config
    from mls.engine import Run
    from mls.gallery import Pixels

WIDTH, HEIGHT = 360, 190  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 44, WIDTH - 10, 8, HEIGHT - 34  # edges of the plot: room around it for ticks
MOST_POINTS = 240  # of a curve; more cannot be told apart
FEW_POINTS = 12  # so few are shown as dots, too
COLOURS = 6
KINDS = ("", "second", "third")  # curves of one run in one chart, told apart by their dashes
IDENTITY = {"run.name", "run.root", "run.recipe"}  # keys that tell runs apart and change nothing
THUMBNAIL = 160  # pixels of a large crop on the page

Point = tuple[float, float | None]  # None: not finite, the curve has a gap


@dataclass
class Card:
    """What the page says about one run."""

    label: str
    run: Run
    config: Config
    rows: list[dict[str, Any]]
    state: str = ""
    cost: list[tuple[str, str]] = field(default_factory=list)
    from_recipe: list[tuple[str, Any, Any]] | str = ""  # a sentence where there is nothing to compare with
    meaning: str = ""
    gallery: list[dict[str, Any]] = field(default_factory=list)
    no_gallery: str = ""


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders, or their names under $MLS_RUNS.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page (default: report.html in the first run).")
    ] = None,
) -> None:
    """Make one HTML page of curves and crops, to look at offline, to keep or to send.

    Examples:

        mls report runs/my-run

        mls report runs/mls runs/moco_v2 --out comparison.html
    """
    from mls.engine import Run
    from mls.files import write_atomically

    opened = list({run.path.resolve(): run for run in map(Run.open, runs)}.values())  # named twice is one run
    names = [run.name for run in opened]
    labels = [run.name if names.count(run.name) == 1 else str(run.path) for run in opened]
    page = render([_card(run, label) for run, label in zip(opened, labels, strict=True)])
    target = opened[0].path if out is None else out.expanduser()
    if target.is_dir():
        target = target / "report.html"
    write_atomically(target, page.encode())
    print(target)


def render(cards: Sequence[Card]) -> str:
    from importlib.resources import files

    from jinja2 import Environment, StrictUndefined

    from mls import __version__

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["chart"] = lambda topic: chart(cards, **topic)
    template = environment.from_string((files("mls.tools") / "report.html").read_text(encoding="utf-8"))
    made = f"mls {__version__}, {time.strftime('%Y-%m-%d %H:%M')}"
    page = template.render(cards=cards, differing=_differing(cards), last=_last_values(cards), made=made, value=_value)
    return page.lstrip()


# ---------------------------------------------------------------------------------------------------- about a run


def _card(run: Run, label: str) -> Card:
    from mls.errors import UserError
    from mls.gallery import gallery, meaning

    card = Card(label, run, run.config, run.metrics())
    reached, total = _progress(card)
    card.state, card.cost = _state(card, reached, total), _cost(card, reached, total)
    card.from_recipe, card.meaning = _from_recipe(card.config), meaning(card.config)
    typer.echo(f"finding the matches of {label}", err=True)
    try:
        rows = gallery(run, warn=lambda text: typer.echo(text, err=True))
    except UserError as error:  # the page is made all the same
        card.no_gallery = str(error)
        return card
    for row in rows:
        shared = row.shared or [False] * len(row.matches)
        matches = zip(map(picture, row.matches), row.scores, shared, row.match_ids, strict=True)
        card.gallery.append({"query": picture(row.query), "id": row.query_id, "matches": list(matches)})
    return card


def _progress(card: Card) -> tuple[int, int | None]:
    """The last step known of, and the number of steps of the whole run where something tells it."""
    saved = card.run.path / "backbone.json"
    facts = json.loads(saved.read_text()) if saved.is_file() else {}
    reached = max([facts.get("step", 0), *(row["step"] for row in card.rows)])
    if not facts.get("epochs"):
        return reached, None
    return reached, round(card.config.optim.epochs * facts["step"] / facts["epochs"])


def _state(card: Card, reached: int, total: int | None) -> str:
    epochs = card.config.optim.epochs
    if card.run.done:
        return f"finished: {reached:,} steps, {epochs:,} epochs"
    if total is not None:
        return f"not finished: step {reached:,} of {total:,}"
    if reached == 0:
        return "nothing logged and nothing saved yet"
    return f"not finished: step {reached:,}, epoch {card.rows[-1]['epoch']:,} of {epochs:,}"


def _cost(card: Card, reached: int, total: int | None) -> list[tuple[str, str]]:
    """What the recipe says it costs and brings, and what the speed of this run makes of it."""
    from statistics import median

    from mls.monitor.progress import duration
    from mls.recipes import find_recipe, recipes

    said = []
    if card.config.run.recipe in recipes():
        text = find_recipe(card.config.run.recipe).read_text(encoding="utf-8")
        found = re.findall(
            r"^# (Cost|Expected): *(.+(?:\n#  +.+)*)", text, re.MULTILINE
        )  # continued lines are indented
        said = [(name, re.sub(r"\s*\n#\s*", " ", words)) for name, words in found]
    speeds = [row["images_per_second"] for row in card.rows if row.get("images_per_second")]
    if speeds and total is not None:
        batch, speed = card.config.data.batch_size, median(speeds)
        here = f"{total:,} steps of {batch:,} images at {speed:,.0f} images/s take {duration(total * batch / speed)}"
        left = f", {duration((total - reached) * batch / speed)} of it to come" if reached < total else ""
        said.append(("Here", here + left))
    return said


def _from_recipe(config: Config) -> list[tuple[str, Any, Any]] | str:
    from mls.config import differences
    from mls.recipes import load_config, recipes

    if config.run.recipe not in recipes():
        return "unknown, because the recipe does not ship with mls"
    changes = differences(load_config(config.run.recipe), config)
    return [change for change in changes if change[0] not in IDENTITY]


def _differing(cards: Sequence[Card]) -> list[tuple[str, list[Any]]]:
    """The keys in which some run differs from the first, with the value of every run."""
    from mls.config import differences, flatten

    values = [dict(flatten(card.config)) for card in cards]
    changed = {key for card in cards for key, _, _ in differences(cards[0].config, card.config)} - IDENTITY
    return [(key, [own[key] for own in values]) for key in values[0] if key in changed]


def _last_values(cards: Sequence[Card]) -> list[tuple[str, list[tuple[float, int] | None]]]:
    """Every metric's last value and its step, for every run."""
    last = [{key: (value, row["step"]) for row in card.rows for key, value in row.items() if value is not None}
            for card in cards]  # fmt: skip
    names = sorted({key for values in last for key in values} - {"step", "epoch"})
    return [(name, [values.get(name) for values in last]) for name in names]


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def picture(crop: Pixels) -> dict[str, str]:
    """A crop as it stands in the page."""
    from base64 import b64encode
    from io import BytesIO

    from PIL import Image

    image, file, kind = Image.fromarray(crop), BytesIO(), "png"
    if max(image.size) > THUMBNAIL:  # a page of photographs as PNG would take many megabytes
        image, kind = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS), "jpeg"
    image.save(file, kind)
    uri = f"data:image/{kind};base64,{b64encode(file.getvalue()).decode()}"
    return {"uri": uri, "look": "smooth" if max(image.size) > 76 else "pixels"}


# ---------------------------------------------------------------------------------------------------- charts


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
    last_step = max(row["step"] for card in cards for row in card.rows)
    x = lambda step: round(LEFT + (RIGHT - LEFT) * step / last_step, 1)
    y = lambda value: round(BOTTOM - (BOTTOM - TOP) * (value - bottom) / (top - bottom), 1)
    lines = []
    for curve in found:
        placed = [None if value is None else (x(step), y(value)) for step, value in curve.points]
        dots = [place for place in placed if place] if len(placed) <= FEW_POINTS else []
        label = f"{cards[curve.run].label}: {curve.label}" if len(cards) > 1 else curve.label
        lines.append({"look": _look(curve, len(cards)), "label": label, "path": _path(placed), "dots": dots})
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


def _look(curve: Curve, runs: int) -> str:
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
