"""The page of `mls report`. Numbers and words are in facts.py, curves.py and labels.py, pictures in gallery.py, the
verdict in mls/monitor/verdict.py; page.html, page.css and page.js are put together here."""

from __future__ import annotations

import json
import time
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import typer

from mls.tools.report import curves, facts, labels
from mls.tools.report.facts import Card
from mls.tools.report.gallery import (
    MATCHES,
    PIXELS,
    SHOWN,
    WHOLE,
    Atlas,
    Box,
    Gallery,
    Matched,
    Shown,
    of_run,
    region_boxes_of,
    sources_of,
    wanted,
)
from mls.tools.report.labels import Pair, pairs_to_judge

if TYPE_CHECKING:
    from torch import Tensor

    from mls.data import Source
    from mls.monitor.labels import LabelStatistics
    from mls.monitor.moments import Moment
    from mls.monitor.nuisance import Nuisance
    from mls.monitor.verdict import Finding

PICTURES, PICTURES_MORE = 1_500_000, 600_000  # bytes, of one run and of each further one: the page stays below 3 MB
MARKS = ("resume", "stop", "skip", "term", "warning")  # events that are drawn into the curves
MOST_MARKS = 100


@dataclass
class Section:
    """All that the page says about one run, of which the templates take their parts."""

    card: Card
    gallery: Gallery
    nuisances: dict[str, list[Nuisance]] = field(default_factory=dict)  # by memory
    quality: dict[str, LabelStatistics] = field(default_factory=dict)  # by memory; of images with labels
    pairs: list[Pair] = field(default_factory=list)
    region_box: Callable[[int, int, int], Box | None] | None = None  # by number, of an image's height and width

    @cached_property
    def replayed(self) -> tuple[str, list[str], list[list[str]]] | None:
        """What `mls replay` has left beside the run: its caption, header and lines."""
        from mls.engine.replay import NOTE, read
        from mls.tools.replay import table_of

        found = read(self.card.run.path / "replay.json")
        if found is None:
            return None
        caption = f"Step {found.step:,}, {found.queries} queries, {found.rows:,} rows. {NOTE}"
        return caption, *table_of(found)

    @cached_property
    def scores(self) -> dict[str, dict[str, list[float]]]:
        return labels.score_curves(self.moment) if self.moment else {}

    @cached_property
    def findings(self) -> list[Finding]:
        from mls.monitor.verdict import Seen, verdict

        first = next(iter(self.nuisances.values()), [])  # of the memory that gives the labels
        percentiles = {nuisance.name: nuisance.percentile for nuisance in first}
        judged = next(iter(self.quality.values()), None)
        known = (judged.precision[-1], judged.chance) if judged and self.card.labels else None
        return verdict(Seen(self.card.config, self.card.log.steps_and_values(), self.moment, percentiles, known))

    @property
    def moment(self) -> Moment | None:
        return self.gallery.moments[-1] if self.gallery.moments else None

    @cached_property
    def tiles(self) -> list[facts.Tile]:
        return facts.tiles(self.card)

    @cached_property
    def results(self) -> list[Mapping[str, Any]]:
        return facts.stored_results(self.card)

    @cached_property
    def maps(self) -> str:
        """What `mls maps` has drawn into the run, for the page."""
        file = self.card.run.path / "maps.png"
        if not file.is_file() or file.stat().st_size > PICTURES:
            return ""
        return f"data:image/png;base64,{b64encode(file.read_bytes()).decode()}"

    @property
    def nuisance_words(self) -> dict[str, str]:
        from mls.monitor.nuisance import WORDS

        return WORDS

    @property
    def expected(self) -> list[tuple[str, str]]:
        """What the recipe promises, where this run is the recipe's."""
        notes = facts.notes_of_recipe(self.card.config.run.recipe)
        return [] if facts.not_the_recipes(self.card, notes) else list(notes.items())

    @property
    def yaml(self) -> str:
        from mls.config import to_yaml

        return "\n".join(map(facts.clip, to_yaml(self.card.config).splitlines()))


def render(cards: Sequence[Card]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    sources, of_cards = sources_of(cards)
    atlas = Atlas(PICTURES + PICTURES_MORE * (len(cards) - 1), sources)
    sections = [_section(card, atlas, *of_card) for card, of_card in zip(cards, of_cards, strict=True)]
    atlas.fill(_wanted(sections))
    environment = Environment(
        loader=PackageLoader("mls.tools.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["value"] = lambda value: facts.clip(value if isinstance(value, str) else json.dumps(value))
    style, script = _text("uPlot.min.css") + _text("page.css"), _text("uPlot.iife.min.js") + _text("page.js")
    page = environment.get_template("page.html").render(
        **_words(sections, atlas), style=style, script=script, hashes={"style": _hash(style), "script": _hash(script)}
    )
    return page.lstrip()


def _words(sections: Sequence[Section], atlas: Atlas) -> dict[str, Any]:
    """What the template speaks of."""
    from mls.monitor.verdict import PERCENTILE

    cards = [section.card for section in sections]
    charts = curves.drawn([card.log for card in cards], [card.axis for card in cards], [card.label for card in cards])
    data = {
        "charts": charts,
        "runs": [_for_script(section, atlas) for section in sections],
        "shown": SHOWN,
        "tiny": atlas.tiny,
        "memories": labels.NAMES,
    }
    data |= {"places": {f"{s}:{i}": place for (s, i), place in atlas.places.items()}, "names": _names(atlas)}
    words: dict[str, Any] = {"sections": sections, "cards": cards, "charts": charts, "atlas": atlas, "facts": facts}
    words |= {"labels": labels, "crop": _Crop(atlas), "shown": SHOWN, "sheets": atlas.sheets, "data": _json(data)}
    words |= {"differing": facts.differing(cards), "high": PERCENTILE, "made": _made()}
    return words | {"blank": Matched(0, WHOLE, score=0.0)}


def _section(card: Card, atlas: Atlas, source: int | None, why: str) -> Section:
    from mls.errors import UserError

    typer.echo(f"finding the matches of {card.label}", err=True)
    opened = None if source is None else atlas.sources[source]
    truth = None if opened is None else labels.true_labels(opened, card.labels)
    section = Section(card, of_run(card, opened, why, truth))
    section.gallery.source = source or 0
    section.region_box = region_boxes_of(card.config, card.odd.append)
    if opened is None or section.moment is None:
        return section
    if card.labels is not None and truth is not None:
        known = [not truth[query.id].isnan().any() for query in section.moment.queries]
        partly = int((truth.isnan().any(1) & ~truth.isnan().all(1)).sum())
        rest = f"; {partly} images with unknown classes are left out" if partly else ""
        card.odd.append(f"{facts.clip(str(card.labels))} labels {sum(known)} of the {len(known)} queries{rest}")
    try:
        _look_at_pixels(section, opened, truth)
    except UserError as error:
        card.odd.append(f"what matches have in common was not measured: {facts.clip(str(error))}")
    return section


def _look_at_pixels(section: Section, source: Source, truth: Tensor | None) -> None:
    """What needs the images themselves, or their labels: what matches have in common, and the rows that look most
    alike."""
    from mls.monitor.labels import label_statistics
    from mls.monitor.nuisance import Thumbnails, nuisances, pixel_nearest

    moment, mirrored = section.gallery.moments[-1], section.card.config.augment.flip > 0
    thumbnails = Thumbnails.of_moment(moment, source, mirrored)
    for memory in labels.memories(moment):
        matches = [query.matches.get(memory, []) for query in moment.queries]
        section.nuisances[memory] = nuisances(moment, matches, thumbnails)
        by_query = {f"{nuisance.name} percentile": nuisance.by_query for nuisance in section.nuisances[memory]}
        if truth is not None and (found := label_statistics(moment, matches, truth, by_query)) is not None:
            section.quality[memory] = found
    nearest = pixel_nearest(thumbnails, MATCHES)
    section.pairs = pairs_to_judge(moment, {n: [(c.id, c.box) for c in found] for n, found in enumerate(nearest)})
    for query, found in zip(section.gallery.shown[-1].queries, nearest, strict=True):
        query.lists[PIXELS] = [Matched(crop.id, crop.box) for crop in found]


def _wanted(sections: Sequence[Section]) -> list[tuple[int, int]]:
    judged = [(s.gallery.source, i) for s in sections for pair in s.pairs for i in (pair.query[0], pair.other[0])]
    found = list(wanted([section.gallery for section in sections]))
    first = sum(len(s.gallery.shown[-1].queries) for s in sections if s.gallery.shown)
    return [*found[:first], *judged, *found[first:]]


def _for_script(section: Section, atlas: Atlas) -> dict[str, Any]:
    gallery = section.gallery
    return {
        "label": section.card.label,
        "source": gallery.source,
        "marks": _marks(section.card),
        "shown": [_moment_data(shown, section, atlas) for shown in gallery.shown],
        "scores": section.scores,
        "pairs": [[p.kind, *p.query, *p.other] for p in section.pairs],
    }


def _moment_data(shown: Shown, section: Section, atlas: Atlas) -> dict[str, Any]:
    def match(query: int, m: Matched) -> list[Any]:
        score = None if m.score is None else round(m.score, 3)
        percentile = None if m.percentile is None else round(m.percentile, 1)
        shared, regions = None if m.shared is None else int(m.shared), regions_of(query, m)
        return [m.id, _short(m.box), m.age, score, percentile, shared, *([regions] if regions else [])]

    def regions_of(query: int, m: Matched) -> list[list[float]]:
        """The boxes of the two regions that are most alike, in the query's image and in the match's."""
        places = [atlas.places.get((section.gallery.source, image)) for image in (query, m.id)]
        if m.regions is None or section.region_box is None or None in places:
            return []
        sides = [(place[4], place[3]) for place in places if place]
        boxes = [section.region_box(n, *of) for n, of in zip(m.regions, sides, strict=True)]
        return [] if None in boxes else [_short(box) for box in boxes if box]

    queries = [
        [
            q.id,
            _short(q.box),
            round(q.agreement, 4),
            {name: [match(q.id, m) for m in found] for name, found in q.lists.items()},
        ]
        for q in shown.queries
    ]
    return {"step": shown.step, "epoch": shown.epoch, "queries": queries}


def _short(box: Sequence[float]) -> list[float]:
    return [round(side, 3) for side in _Crop.known(box)]


def _marks(card: Card) -> list[dict[str, Any]]:
    found = []
    for row in card.events:
        if row["event"] in MARKS and type(row.get("step")) is int and row["step"] > 0:
            text = " ".join(str(row[name]) for name in ("reason", "text", "name") if row.get(name))
            found.append({"step": row["step"], "kind": row["event"], "text": facts.clip(text)})
    return found[-MOST_MARKS:]


def _names(atlas: Atlas) -> dict[str, str]:
    return {f"{source}:{image}": facts.clip(atlas.sources[source].describe(image)) for source, image in atlas.places}


class _Crop:
    """Where a crop lies in the sheets: for an SVG that shows this part of one."""

    def __init__(self, atlas: Atlas) -> None:
        self.atlas = atlas

    def __call__(self, source: int, image: int, box: Sequence[float]) -> dict[str, Any] | None:
        place = self.atlas.places.get((source, image))
        if place is None:
            return None
        sheet, x, y, width, height = place
        x0, y0, x1, y1 = self.known(box)
        part = x + x0 * width, y + y0 * height, max(1e-3, x1 - x0) * width, max(1e-3, y1 - y0) * height
        return {"sheet": sheet, "part": " ".join(f"{number:.2f}" for number in part)}

    @staticmethod
    def known(box: Sequence[float]) -> Sequence[float]:
        """All of the image where the box was not written down."""
        return box if all(side == side for side in box) else (0.0, 0.0, 1.0, 1.0)


def _json(data: Any) -> str:
    """For a script element, which must hold no end of itself."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _text(name: str) -> str:
    from importlib.resources import files

    return (files("mls.tools.report") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """What a browser compares style and script with before it takes them: nothing else can run in the page."""
    from hashlib import sha256

    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def _made() -> str:
    from mls import __version__

    return f"mls {__version__}, {time.strftime('%Y-%m-%d %H:%M')}"
