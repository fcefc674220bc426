"""`mls report`: one offline page about one or more runs. Words and looks are in report.html, charts in charts.py, the
crops come from mls/engine/gallery.py, the numbers from metrics.jsonl and nowhere else."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mls.tools.charts import chart

if TYPE_CHECKING:
    from mls.config import Config
    from mls.engine import Run
    from mls.frozen.match_picture import Pixels

IDENTITY = {"run.name", "run.root", "run.recipe"}  # keys that tell runs apart and change nothing
THUMBNAIL = 160  # pixels of a large crop on the page


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
    odd: list[str] = field(default_factory=list)  # sentences about files that cannot be read
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


def _card(run: Run, label: str) -> Card:
    from mls.engine.gallery import gallery, meaning
    from mls.errors import UserError
    from mls.monitor.log import rows_and_odd_lines

    rows, odd = rows_and_odd_lines(run.path / "metrics.jsonl")
    card = Card(label, run, run.config, rows)
    if odd:
        card.odd.append(f"metrics.jsonl: left out {len(odd)} lines that hold no row, the first is line {odd[0]}")
    reached, total = _progress(card)
    card.from_recipe, card.meaning = _from_recipe(card.config), meaning(card.config)
    card.state, card.cost = _state(card, reached, total), _cost(card, reached, total)
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
    logged, total = max([0, *(row["step"] for row in card.rows)]), None
    if not saved.is_file():
        return logged, None
    try:
        facts = json.loads(saved.read_bytes())
        step = int(facts["step"])
        if facts["epochs"]:
            total = round(card.config.optim.epochs * step / facts["epochs"])
        return max(step, logged), total
    except (ValueError, RecursionError, KeyError, TypeError, OverflowError):
        card.odd.append("backbone.json cannot be read: how far the run is follows from metrics.jsonl alone")
        return logged, None


def _state(card: Card, reached: int, total: int | None) -> str:
    epochs = card.config.optim.epochs
    if card.run.done:
        return f"finished: {reached:,} steps, {epochs:,} epochs"
    if total is not None:
        return f"not finished: step {reached:,} of {total:,}"
    if not card.rows:
        return "nothing logged and nothing saved yet"
    return f"not finished: step {reached:,}, epoch {card.rows[-1]['epoch']:,} of {epochs:,}"


def _cost(card: Card, reached: int, total: int | None) -> list[tuple[str, str]]:
    """What the recipe says it costs and brings, where this run is the recipe's, and what this run's speed tells."""
    from statistics import median

    from mls.progress import duration

    notes = []
    of_recipe = _notes_of_recipe(card.config.run.recipe)
    other = _not_the_recipes(card, of_recipe, total) if of_recipe else ""
    for name, words in of_recipe.items():
        notes.append((name, f"the recipe's is not for this run: {other}" if other else words))
    speeds = [row["images_per_second"] for row in card.rows if (row.get("images_per_second") or 0) > 0]
    if speeds and total is not None:
        batch, speed = card.config.data.batch_size, median(speeds)
        here = f"{total:,} steps of {batch:,} images at {speed:,.0f} images/s take {duration(total * batch / speed)}"
        left = f", {duration((total - reached) * batch / speed)} of it to come" if reached < total else ""
        notes.append(("Here", here + left))
    return notes


def _notes_of_recipe(recipe: str) -> dict[str, str]:
    from mls.recipes import find_recipe, recipes

    if recipe not in recipes():
        return {}
    text = find_recipe(recipe).read_text(encoding="utf-8")
    found = re.findall(r"^# (Cost|Expected): *(.+(?:\n#  +.+)*)", text, re.MULTILINE)  # continued lines are indented
    return {name: re.sub(r"\s*\n#\s*", " ", words) for name, words in found}


def _not_the_recipes(card: Card, of_recipe: dict[str, str], total: int | None) -> str:
    """In what a run differs from its recipe that changes its numbers; "" where it does not. Other images are told by
    the number of their steps."""
    from mls.engine.run import FREE

    changes = [] if isinstance(card.from_recipe, str) else card.from_recipe
    keys = [key for key, _, _ in changes if key not in FREE and not key.startswith(("run.", "monitor."))]
    if keys:
        return f"{', '.join(keys)} {'is' if len(keys) == 1 else 'are'} changed"
    steps = re.search(r"([\d,]+) steps of", of_recipe["Cost"])
    if steps is None or total == int(steps[1].replace(",", "")):
        return ""
    return (
        "how many images it has is not known yet" if total is None else f"its data make {total:,} steps, not {steps[1]}"
    )


def _from_recipe(config: Config) -> list[tuple[str, Any, Any]] | str:
    from mls.config import differences
    from mls.recipes import load_config, recipes

    if config.run.recipe not in recipes():
        return "unknown, because the recipe does not ship with mls"
    changes = differences(load_config(config.run.recipe), config)
    return [change for change in changes if change[0] not in IDENTITY]


def _differing(cards: Sequence[Card]) -> list[tuple[str, list[Any]]]:
    """The keys in which some run differs from the first, with the value of every run."""
    from mls.config import NOT_A_KEY, differences, flatten

    values = [dict(flatten(card.config)) for card in cards]
    changed = {key for card in cards for key, _, _ in differences(cards[0].config, card.config)} - IDENTITY
    keys = dict.fromkeys(key for own in values for key in own if key in changed)
    return [(key, [own.get(key, NOT_A_KEY) for own in values]) for key in keys]


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
    return {"uri": uri, "css": "smooth" if max(image.size) > 76 else "pixels"}
