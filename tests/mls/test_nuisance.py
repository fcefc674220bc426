"""What matches have in common without labels and with them, on images in which each nuisance is drawn by itself."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mls.errors import DataError
from mls.monitor.labels import chosen, label_statistics
from mls.monitor.moments import Crop, Match, Moment, Query
from mls.monitor.nuisance import WORDS, Thumbnails, nuisances, pixel_nearest

IMAGES, QUERIES, K = 240, 30, 4
DRAW = torch.Generator().manual_seed(0)
LAYOUTS = torch.rand(12, 4, 4, generator=DRAW)
LAYOUTS -= LAYOUTS.mean((1, 2), keepdim=True)
COLOURS = torch.rand(12, 3, generator=DRAW)
KINDS = {"layout": torch.arange(IMAGES) % 12, "colour": torch.arange(IMAGES) // 20}


@dataclass
class Drawn:
    """Twelve layouts in each of twelve colours."""

    images: Tensor
    name: str = "drawn"
    class_names: None = None
    labels: None = None

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        return self.images[index]

    def describe(self, index: int) -> str:
        return str(index)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        return np.arange(len(self))


@pytest.fixture(scope="module")
def source() -> Drawn:
    grey = LAYOUTS[KINDS["layout"]].repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    colour = COLOURS[KINDS["colour"]][:, :, None, None]
    return Drawn((255 * (0.4 * colour + 0.3 + 0.25 * grey)).round().to(torch.uint8))


def box(corner: float = 0.0) -> tuple[float, float, float, float]:
    return (corner, corner, 1.0, 1.0)


def moment_of(near: Callable[[int], list[int]], by_place: bool = False) -> Moment:
    """Queries of one image each, matches as `near` says; all crops differ a little in place."""
    draw = torch.Generator().manual_seed(1)
    place = lambda: round(0.06 * float(torch.rand(1, generator=draw)), 4)
    queries = []
    for image in range(0, IMAGES, IMAGES // QUERIES):
        own = place()
        corners = [own if by_place else place() for _ in range(K)]
        crops = enumerate(zip(near(image), corners, strict=True))
        found = [Match(i, box(corner), rank, 0.9 - rank / 10, 99.0 - rank) for rank, (i, corner) in crops]
        queries.append(Query(image, box(own), {"features": found, "projections": found[::-1][:2]}))
    random = [Crop(int(i), box(place())) for i in torch.randint(IMAGES, (200,), generator=draw)]
    return Moment(8, 4, K, IMAGES, 0.0, queries, random, {}, {}, {}, None, {})


def like(kind: str) -> Callable[[int], list[int]]:
    def near(image: int) -> list[int]:
        return [other for other in shuffled(image) if KINDS[kind][other] == KINDS[kind][image]][:K]

    return near


def anything(image: int) -> list[int]:
    return shuffled(image)[:K]


def shuffled(image: int) -> list[int]:
    """All other images."""
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(image)).tolist()
    return [other for other in order if other != image]


@pytest.mark.parametrize(("told", "near"), [("layout", like("layout")), ("colour", like("colour")),
                                            ("geometry", anything), ("", anything)])  # fmt: skip
def test_matches_that_follow_one_nuisance_are_told_by_it_alone(told: str, near: Any, source: Drawn) -> None:
    moment = moment_of(near, by_place=told == "geometry")
    thumbnails = Thumbnails.of_moment(moment, source, mirrored=False)
    table = nuisances(moment, chosen(moment, "backbone", K), thumbnails)
    assert [row.name for row in table] == list(WORDS)
    for row in table:
        if row.name == told:
            assert row.percentile > 90
        elif row.name != "thumbnail":  # of which colour is a part
            assert abs(row.percentile - 50) < max(6, 4 * row.error)
        assert row.percentile == pytest.approx(np.mean([value for value in row.by_query if value is not None]))
    assert table[-1].pixel_nearest > 97  # the competitor is chosen by thumbnails
    assert nuisances(moment, [[] for _ in moment.queries], thumbnails) == []


def test_a_mirror_image_is_alike_in_layout_where_views_are_flipped(source: Drawn) -> None:
    flipped = replace(source, images=torch.cat([source.images, source.images.flip(3)]))
    moment = moment_of(lambda image: [image + IMAGES] * K)
    of = [Thumbnails.of_moment(moment, flipped, mirrored=flips) for flips in (False, True)]
    plain, mirrored = (nuisances(moment, chosen(moment, "backbone", K), one)[0] for one in of)
    assert plain.percentile < 75 and mirrored.percentile > 90


def test_thumbnails_are_of_the_boxes(source: Drawn) -> None:
    left, whole = Crop(3, (0.0, 0.0, 0.5, 1.0)), Crop(3, box())
    thumbnails = Thumbnails(source, [left, whole])
    found = thumbnails.pixels[thumbnails.of([whole, left, whole])]
    assert torch.equal(found[0], found[2])
    half = source.images[3:4, :, :, :16].float() / 255
    expected = torch.nn.functional.interpolate(half, (8, 8), mode="bilinear", antialias=True)[0]
    assert torch.allclose(found[1], expected, atol=0.01)


def test_pixel_nearest_rows_come_nearest_first_and_from_other_images(source: Drawn) -> None:
    moment = moment_of(anything)
    of = Thumbnails.of_moment(moment, source, mirrored=False)
    for query, rows in zip(moment.queries, pixel_nearest(of, 5), strict=True):
        gaps = (of.pixels[of.of([query])] - of.pixels[of.of(rows)]).flatten(1).norm(dim=1)
        assert len(rows) == 5 and query.id not in [row.id for row in rows] and bool((gaps.diff() >= 0).all())


def test_images_that_are_gone_are_told(source: Drawn) -> None:
    with pytest.raises(DataError, match=r"has seen image 239, drawn has 100 now: bring back"):
        Thumbnails(replace(source, images=source.images[:100]), [Crop(239, box())])


# ------------------------------------------------------------------------------------------------- with labels

CLASSES = torch.nn.functional.one_hot(KINDS["layout"]).float()


def test_label_statistics_are_those_of_a_plain_count() -> None:
    moment = moment_of(lambda image: [*like("layout")(image)[:2], *anything(image)[:2]])
    found = label_statistics(moment, chosen(moment, "backbone", K), CLASSES)
    assert found is not None and found.queries == QUERIES
    shares = lambda one, others: [float(bool((CLASSES[one] * CLASSES[i]).any())) for i in others]
    precision, random = [], []
    for query in moment.queries:
        precision.append(shares(query.id, [match.id for match in query.matches["features"]]))
        random.append(np.mean(shares(query.id, [crop.id for crop in moment.random if crop.id != query.id])))
    hits, total = np.cumsum(precision, 1), IMAGES * np.array(random)[:, None]
    count = np.arange(1, K + 1)
    assert found.precision == pytest.approx((hits / count).mean(0)) and found.precision[:2] == [1, 1]
    assert found.chance == pytest.approx(np.mean(random))
    assert found.recall == pytest.approx((hits / total).mean(0), rel=1e-6)
    assert found.pushed_away == pytest.approx(((total - hits) / (IMAGES - count)).mean(0), rel=1e-6)
    assert [part[:2] for part in found.by_age] == [(0, 0), (1, 1), (2, 2), (3, 3)]  # the age is the rank here
    assert [part[2] for part in found.by_age] == pytest.approx(np.mean(precision, 0))
    assert found.dominance[:2] == [1, 1] and found.dominance_chance[0] == 1 > found.dominance_chance[-1]


def test_a_statistic_that_tells_the_precision_is_found() -> None:
    right = lambda image: image // 8 % 4
    moment = moment_of(lambda image: [*like("layout")(image)[: right(image)], *[(image + 1) % IMAGES] * 4][:K])
    known = {"told": [float(right(query.id)) for query in moment.queries], "not known": [None] * QUERIES}
    found = label_statistics(moment, chosen(moment, "backbone", K), CLASSES, known)
    assert found is not None and found.against_precision["told"] == pytest.approx(1)
    assert not {"not known", "score"} & found.against_precision.keys()  # the score is the same for all queries


def test_images_without_labels_count_for_nothing() -> None:
    moment = moment_of(lambda image: [*like("layout")(image)[:2], *anything(image)[:2]])
    few = CLASSES.clone()
    few[[query.id for query in moment.queries[:20]]] = math.nan
    found = label_statistics(moment, chosen(moment, "backbone", K), few)
    assert found is not None and 0 < found.queries <= 10 and found.precision[0] > 0.8 > found.chance
    assert label_statistics(moment, chosen(moment, "backbone", K), torch.full_like(CLASSES, math.nan)) is None
    assert label_statistics(moment, [[] for _ in moment.queries], CLASSES) is None


def test_memories_are_joined_as_the_objective_says() -> None:
    moment = moment_of(anything)  # the second memory holds the last two of the first four
    counts = {name: {len(rows) for rows in chosen(moment, name, 3)} for name in ("backbone", "projection")}
    assert counts == {"backbone": {3}, "projection": {2}}
    for query, union, both in zip(
        moment.queries, chosen(moment, "union", 3), chosen(moment, "intersection", 3), strict=True
    ):
        rows = query.matches["features"]
        assert sorted(union) == sorted(rows) and both == [rows[2]]


def test_random_rows_are_looked_at_once_for_all_tables_of_a_moment(
    source: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mls.monitor import nuisance

    laid_out, plain = [], nuisance._layout
    monkeypatch.setattr(nuisance, "_layout", lambda crops: (laid_out.append(len(crops)), plain(crops))[1])
    moment = moment_of(anything)
    thumbnails = Thumbnails.of_moment(moment, source, mirrored=False)
    crops = len(thumbnails.pixels)
    for _ in range(3):
        nuisances(moment, chosen(moment, "backbone", K), thumbnails)
    pixel_nearest(thumbnails, 5)
    assert laid_out == [crops] + 4 * QUERIES * [1]  # the rest are queries, whose mirror images count, too
