"""What matches have in common that is not what they show: where light and dark lie in the crop, its colour, its place
in the image, its pixels as a thumbnail. Told without labels, from the crops of a moment and as many random ones. How
many matches share a label is in labels.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from mls.data import Source
from mls.data.crops import SPARE, cut, reduced
from mls.data.decode import Encoded, UnreadableImage
from mls.errors import DataError, reason
from mls.monitor.moments import Box, Crop, Hub, Match, Moment, Query

LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue
SIDE, CELLS = 8, 4  # of a thumbnail, and of its grid of grey
WORDS = {
    "layout": f"where light and dark lie: a grid of {CELLS} × {CELLS} greys without their mean",
    "colour": "the mean colour",
    "geometry": "the place and size of the crop in its image",
    "thumbnail": f"the crop at {SIDE} × {SIDE} pixels",
}
Placed = Crop | Hub | Match | Query  # all that has an id and a box
CHANCE = 50.0  # the percentile of matches that have nothing to do with a nuisance


@dataclass(frozen=True)
class Nuisance:
    """How near the matches are to their queries in one nuisance: 50 is chance, 100 nearer than every random row."""

    name: str  # of WORDS
    percentile: float  # of the matches among random rows: the mean over their queries
    error: float  # standard error of that mean
    pixel_nearest: float  # the percentile of a competitor that learnt nothing: the nearest thumbnails of random rows
    by_query: list[float | None]  # None: the query has no match


class Among(NamedTuple):
    """The random rows of other images than a query's, and how alike they are to it in each of WORDS."""

    rows: list[Crop]
    alike: dict[str, Float[Tensor, " rows"]]

    def nearest(self, count: int) -> list[int]:
        """The places of those with the nearest thumbnails, nearest first."""
        return self.alike["thumbnail"].argsort(descending=True, stable=True)[:count].tolist()


class Thumbnails:
    """Crops of a source at SIDE × SIDE pixels, and their layouts and colours. An image is decoded once for all its
    crops, as small as they allow. `mirrored`: views are flipped, so that a crop and its mirror image are alike in
    layout and as thumbnails."""

    def __init__(self, source: Source, crops: Iterable[Placed], mirrored: bool = False) -> None:
        by_image: dict[int, dict[Box, None]] = {}
        for crop in crops:
            by_image.setdefault(crop.id, {})[crop.box] = None
        found = [
            (image, box, thumbnail)
            for image, boxes in by_image.items()
            for box, thumbnail in zip(boxes, _thumbnails(source, image, list(boxes)), strict=True)
        ]
        self.places = {(image, box): place for place, (image, box, _) in enumerate(found)}
        self.pixels, self.mirrored = torch.stack([thumbnail for *_, thumbnail in found]).float() / 255, mirrored
        self.layouts, self.colours = _layout(self.pixels), self.pixels.mean((2, 3))
        self.among: list[Among] = []  # of each query of a moment

    @classmethod
    def of_moment(cls, moment: Moment, source: Source, mirrored: bool) -> Thumbnails:
        """Of all its crops, once for all tables that are made of them."""
        matches = [match for query in moment.queries for found in query.matches.values() for match in found]
        made = cls(source, [*moment.queries, *matches, *moment.random], mirrored)
        for query in moment.queries:
            rows = [crop for crop in moment.random if crop.id != query.id]
            made.among.append(Among(rows, made.similarities(query, rows)))
        return made

    def of(self, crops: Iterable[Placed]) -> list[int]:
        """Their places."""
        return [self.places[crop.id, crop.box] for crop in crops]

    def similarities(self, query: Placed, rows: Sequence[Placed]) -> dict[str, Float[Tensor, " rows"]]:
        """How alike each row is to the query in each of WORDS; only their order counts."""
        (own,), others = self.of([query]), self.of(rows)
        views = self.pixels[own][None]
        views = torch.cat([views, views.flip(3)]) if self.mirrored else views
        boxes = torch.tensor([query.box, *(row.box for row in rows)])
        return {
            "layout": (self.layouts[others] @ _layout(views).T).amax(1),
            "colour": -(self.colours[own] - self.colours[others]).norm(dim=1),
            "geometry": -(boxes[:1] - boxes[1:]).norm(dim=1),
            "thumbnail": -(views[:, None] - self.pixels[others]).flatten(2).norm(dim=2).amin(0),
        }


def nuisances(moment: Moment, matches: Sequence[Sequence[Match]], thumbnails: Thumbnails) -> list[Nuisance]:
    """The table of the `matches` of each query; empty where fewer than two queries have some."""
    of_matches: dict[str, list[float | None]] = {name: [] for name in WORDS}
    of_nearest: dict[str, list[float | None]] = {name: [] for name in WORDS}
    for query, found, among in zip(moment.queries, matches, thumbnails.among, strict=True):
        alike, nearest = thumbnails.similarities(query, found), among.nearest(min(moment.k, len(found)))
        for name, all_rows in among.alike.items():
            for values, places in ((alike[name], of_matches), (all_rows[nearest], of_nearest)):
                known = bool(found and among.rows)
                places[name].append(float(percentiles(values, all_rows).mean()) if known else None)
    if sum(value is not None for value in of_matches["layout"]) < 2:
        return []
    return [Nuisance(name, *_mean_and_error(of_matches[name]), _mean_and_error(of_nearest[name])[0], of_matches[name])
            for name in WORDS]  # fmt: skip


def _mean_and_error(values: Sequence[float | None]) -> tuple[float, float]:
    known = [value for value in values if value is not None]
    return fmean(known), stdev(known) / len(known) ** 0.5


def pixel_nearest(thumbnails: Thumbnails, count: int) -> list[list[Crop]]:
    """For each query the random rows of other images with the nearest thumbnails, nearest first."""
    return [[among.rows[place] for place in among.nearest(count)] for among in thumbnails.among]


def _layout(thumbnails: Float[Tensor, "crops 3 side side"]) -> Float[Tensor, "crops cells"]:
    """Unit vectors; 0 for a crop of one grey."""
    weights = thumbnails.new_tensor(LUMINANCE)[:, None, None]
    grey = F.adaptive_avg_pool2d((thumbnails * weights).sum(1), CELLS)
    return F.normalize((grey - grey.mean((1, 2), keepdim=True)).flatten(1), dim=1, eps=1e-6)


def percentiles(values: Float[Tensor, " values"], among: Float[Tensor, " others"]) -> Float[Tensor, " values"]:
    """How many in a hundred of the others are smaller; equal ones count half.

    >>> percentiles(torch.tensor([0.0, 2.0, 9.0]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    tensor([  0.0000,  37.5000, 100.0000])
    """
    smaller = (among < values[:, None]).double().mean(1) + (among == values[:, None]).double().mean(1) / 2
    return (100 * smaller).float()


def _thumbnails(source: Source, image: int, boxes: Sequence[Box]) -> list[UInt8[Tensor, "3 side side"]]:
    if image >= len(source):
        raise DataError(
            f"the run has seen image {image}, {source.name} has {len(source)} now: "
            "bring back the images that the run was trained on"
        )
    try:
        encoded = Encoded(source.read(image))
        height, width = encoded.height, encoded.width
        places = [_pixels(box, height, width) for box in boxes]
        factor = encoded.factor(min(min(place[2:]) for place in places) / (SPARE * SIDE))
        pixels = encoded.pixels(factor)
    except (UnreadableImage, OSError) as error:
        raise DataError(f"{source.describe(image)} cannot be read any more ({reason(error)}): bring it back") from None
    return [cut(pixels, reduced(place, factor), SIDE) for place in places]


def _pixels(box: Box, height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of a box, which has one pixel or more."""
    left, top = min(round(box[0] * width), width - 1), min(round(box[1] * height), height - 1)
    return top, left, max(1, round(box[3] * height) - top), max(1, round(box[2] * width) - left)
