"""The pictures of `mls report`: what each query matched at each moment, and one small picture of every image that is
shown, of which the page cuts its crops. Pictures come from the data set, matches from the run's moments."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mls.errors import UserError
from mls.tools.report.facts import Card, clip

if TYPE_CHECKING:
    from PIL import Image

    from mls.config import Config
    from mls.data import Source
    from mls.monitor.moments import Moment, Query

CELL = 96  # pixels of the longer side of a picture
TINY = 64  # pictures up to this size, whose pixels are seen, are kept well
ACROSS, DOWN = 16, 20  # pictures in a sheet
QUALITY, QUALITY_OF_TINY = 45, 85  # of WebP
SHOWN = 12  # queries, until more are wanted
MATCHES = 5  # of each query
PIXELS = "pixels"  # the list of the rows that look most alike, beside what a network matched

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Matched:
    """A crop, and what is known of it as a match."""

    id: int
    box: Box
    age: int | None = None  # steps
    score: float | None = None
    percentile: float | None = None
    shared: bool | None = None  # has it a true label in common with the query? None: not known
    regions: tuple[int, int] | None = None  # numbers of the query's and its own that are most alike


@dataclass(frozen=True)
class Asked:
    id: int
    box: Box
    lists: dict[str, list[Matched]]  # by memory, nearest first

    @property
    def agreement(self) -> float:
        """Share of the rows that both memories choose; with one memory how far its matches stand out."""
        rows = [{(m.id, m.box) for m in found} for memory, found in self.lists.items() if memory != PIXELS]
        if len(rows) > 1:
            return len(rows[0] & rows[1]) / max(1, len(rows[0]))
        known = [m.percentile or 0.0 for m in next(iter(self.lists.values()), [])]
        return sum(known) / max(1, len(known)) / 100


@dataclass
class Shown:
    """One moment of the gallery."""

    step: int
    epoch: int
    queries: list[Asked]

    def worst(self) -> list[int]:
        return sorted(range(len(self.queries)), key=lambda number: self.queries[number].agreement)


@dataclass
class Gallery:
    """A run's; without one `missing` says why."""

    source: int = 0  # its number in the atlas
    shown: list[Shown] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    missing: str = ""
    meaning: str = ""


def of_run(card: Card, source: Source | None, why: str, labels: Any = None) -> Gallery:
    """`labels`: a tensor [images, classes], NaN where an image has none; None: no image has any."""
    from mls.monitor import moments

    kept = moments.read(card.run.path, card.odd.append)
    found = Gallery(meaning=moments.meaning(card.config), missing=why, moments=kept)
    if not found.moments and not why:
        from mls.engine.gallery import last_moment

        try:  # of an older run
            found.moments = [last_moment(card.run, card.odd.append)]
        except UserError as error:  # the page is made all the same
            found.missing = str(error)
    found.shown = [_of_moment(moment, labels) for moment in found.moments]
    return found


def _of_moment(moment: Moment, labels: Any) -> Shown:
    def matched(query: int, match: Any, regions: tuple[int, int] | None) -> Matched:
        shared = None
        if labels is not None and max(query, match.id) < len(labels):
            both = (labels[query] * labels[match.id]).sum()
            shared = None if both.isnan() else bool(both > 0)
        return Matched(*match, shared=shared, regions=regions if regions and min(regions) >= 0 else None)

    def lists(query: Query) -> dict[str, list[Matched]]:
        alike = {"regions": query.regions}  # of the other memories there are none
        return {
            name: [
                matched(query.id, match, regions)
                for match, regions in zip_longest(found, alike.get(name, [])[:MATCHES])
            ]
            for name, found in ((name, found[:MATCHES]) for name, found in query.matches.items())
        }

    return Shown(moment.step, moment.epoch, [Asked(query.id, query.box, lists(query)) for query in moment.queries])


def region_boxes_of(config: Config, say: Callable[[str], None]) -> Callable[[int, int, int], Box | None] | None:
    """Of a run whose labels come from regions the box of a region in an image, by its number and the image's height and
    width: of lists from a file as the file says. None: there is no region of this number."""
    from mls.config import MLSOptions

    if not isinstance(config.objective, MLSOptions) or config.objective.labels_from != "regions":
        return None
    from mls.core.neighbour_lists import NeighbourLists  # with torchvision, for those who need it
    from mls.core.regions import box_shares

    options = config.objective.regions
    if options.lists is not None:
        try:
            told = NeighbourLists.open(Path(options.lists).expanduser()).identity
            options = replace(options, grid=int(told["grid"]), side=float(told["side"]))
        except (UserError, KeyError, TypeError, ValueError) as error:
            say(f"regions that matched are not shown: {clip(str(error))}")
            return None
    return lambda number, height, width: dict(enumerate(box_shares(height, width, options))).get(number)


# ------------------------------------------------------------------------------------------------------- the pictures


@dataclass(frozen=True)
class Sheet:
    """Many pictures in one file, which costs less than a file each."""

    uri: str
    width: int
    height: int


@dataclass
class Atlas:
    """Small pictures of images, the most wanted first, until there are `most` bytes of them."""

    most: int
    sources: list[Source] = field(default_factory=list)
    places: dict[tuple[int, int], tuple[int, int, int, int, int]] = field(default_factory=dict)  # sheet, x, y, w, h
    sheets: list[Sheet] = field(default_factory=list)
    cell: int = CELL
    unreadable: list[str] = field(default_factory=list)
    left_out: int = 0

    @property
    def tiny(self) -> bool:
        return self.cell <= TINY

    def fill(self, wanted: Iterable[tuple[int, int]]) -> None:
        """`wanted`: images as (source, id)."""
        keys = list(dict.fromkeys(wanted))
        if not keys:
            return
        first = [max(picture.size) for _, picture in self._pictures(keys[:8], CELL)]
        self.cell = min(CELL, max(first, default=CELL) or 1)
        spent, start = 0, 0
        while start < len(keys):
            part = keys[start : start + ACROSS * DOWN]
            data, places = self._sheet(part)
            if spent + len(data) > self.most:
                part = part[: int(len(part) * 0.95 * (self.most - spent) / len(data))]
                if len(part) >= ACROSS:
                    data, places = self._sheet(part)
                else:
                    places = {}
                self.left_out = len(keys) - start - len(part)
            if places:
                self._add(data, places)
            if self.left_out:
                return
            spent, start = spent + len(data), start + len(part)

    def _add(self, data: bytes, places: Mapping[tuple[int, int], tuple[int, int, int, int]]) -> None:
        uri = f"data:image/webp;base64,{b64encode(data).decode()}"
        width, height = ACROSS * self.cell, self.cell * (max(y for _, y, _, _ in places.values()) // self.cell + 1)
        self.places |= {key: (len(self.sheets), *place) for key, place in places.items()}
        self.sheets.append(Sheet(uri, width, height))

    def _sheet(self, keys: Sequence[tuple[int, int]]) -> tuple[bytes, dict[tuple[int, int], tuple[int, int, int, int]]]:
        from PIL import Image

        sheet = Image.new("RGB", (ACROSS * self.cell, -(-len(keys) // ACROSS) * self.cell))
        places = {}
        for number, (key, picture) in enumerate(self._pictures(keys, self.cell)):
            x, y = number % ACROSS * self.cell, number // ACROSS * self.cell
            sheet.paste(picture, (x, y))
            places[key] = (x, y, *picture.size)
        file = BytesIO()
        quality = QUALITY_OF_TINY if self.tiny else QUALITY
        sheet.save(file, "webp", quality=quality, method=4, use_sharp_yuv=self.tiny)
        return file.getvalue(), places

    def _pictures(self, keys: Iterable[tuple[int, int]], most: int) -> Iterator[tuple[tuple[int, int], Image.Image]]:
        from PIL import Image

        from mls.data.decode import Encoded, UnreadableImage

        for source, image in keys:
            try:
                encoded = Encoded(self.sources[source].read(image))
                pixels = encoded.pixels(encoded.factor(max(encoded.width, encoded.height) / most))
            except (UnreadableImage, OSError, IndexError, UserError) as error:
                self.unreadable.append(f"image {image} cannot be read any more ({clip(str(error))})")
                continue
            picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            if max(picture.size) > most:
                sides = [max(1, round(most * side / max(picture.size))) for side in picture.size]
                picture = picture.resize((sides[0], sides[1]), Image.Resampling.LANCZOS)
            yield (source, image), picture


def sources_of(cards: Sequence[Card]) -> tuple[list[Source], list[tuple[int | None, str]]]:
    """The data sets of the runs, each once; for every run the number of its own, or why it cannot be opened."""
    from mls.data.sources import build_source

    sources: list[Source] = []
    known: dict[Any, tuple[int | None, str]] = {}
    of_runs = []
    for card in cards:
        key = _identity(card.config)
        if key not in known:
            try:
                sources.append(build_source(card.config.data))
                known[key] = len(sources) - 1, ""
            except (UserError, OSError) as error:
                known[key] = None, f"the images cannot be shown: {clip(str(error))}"
        of_runs.append(known[key])
    return sources, of_runs


def _identity(config: Config) -> tuple[Any, ...]:
    data = config.data
    return data.source, data.root, data.annotations, data.limit, data.scenes


def wanted(galleries: Sequence[Gallery]) -> Iterator[tuple[int, int]]:
    """The images that the galleries show, in the order in which they matter."""
    lasts = [(gallery, gallery.shown[-1]) for gallery in galleries if gallery.shown and not gallery.missing]
    for gallery, last in lasts:
        yield from ((gallery.source, query.id) for query in last.queries)
    for gallery, _ in lasts:
        for hubs in gallery.moments[-1].hubs.values() if gallery.moments else ():
            yield from ((gallery.source, hub.id) for hub in hubs)
    for part in (slice(SHOWN), slice(SHOWN, None)):
        for gallery, last in lasts:
            yield from _of_queries(gallery.source, last, last.worst()[part], None)
        if part.stop:
            for gallery, last in lasts:
                memory = next(iter(last.queries[0].lists), None) if last.queries else None
                for shown in reversed(gallery.shown[:-1]):
                    yield from _of_queries(gallery.source, shown, last.worst()[part], memory)
    for gallery, _ in lasts:
        for shown in reversed(gallery.shown[:-1]):
            yield from _of_queries(gallery.source, shown, range(len(shown.queries)), None)


def _of_queries(source: int, shown: Shown, numbers: Iterable[int], memory: str | None) -> Iterator[tuple[int, int]]:
    for number in numbers:
        if number < len(shown.queries):
            lists = shown.queries[number].lists
            for name in lists if memory is None else (memory,):
                yield from ((source, match.id) for match in lists.get(name, ()))
