"""`found.png`: what is drawn is where it is in the image, and truth that was found looks like the truth."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mls.config import ScenesConfig
from mls.data.pictures import VOID
from mls.eval.data import objects, regions
from mls.eval.dense import pictures
from mls.eval.dense.coco_ap import Detections

FEW = ScenesConfig(count=3, test_count=4)


def columns(file: Path) -> list[np.ndarray]:
    """The image, found and true, of all lines."""
    sheet = np.asarray(Image.open(file).convert("RGB")).astype(int)
    width = pictures.HEIGHT
    lefts = [pictures.GAP + place * (width + pictures.GAP) for place in range(3)]
    return [sheet[pictures.CAPTION + pictures.GAP : pictures.HEIGHT, left : left + width] for left in lefts]


def test_regions_that_were_found_look_like_the_truth(tmp_path: Path) -> None:
    images = regions.scenes(FEW).test
    rows = pictures.chosen(images)
    assert rows == [0, 1, 2, 3]
    pictures.save(tmp_path / "found.png", images, rows, [images.labels(row) for row in rows])
    image, found, true = columns(tmp_path / "found.png")
    assert np.array_equal(found, true)
    assert not np.array_equal(image, true)


def test_void_is_black_whatever_the_image_shows() -> None:
    labels = torch.full((8, 8), VOID, dtype=torch.uint8)
    drawn = pictures.painted(torch.full((3, 8, 8), 200, dtype=torch.uint8), labels)
    assert np.asarray(drawn).max() == 0


@pytest.mark.parametrize("score", [0.9, 0.1])
def test_objects_are_drawn_where_they_are_if_the_score_is_high(score: float, tmp_path: Path) -> None:
    images = objects.scenes(FEW).test
    true = images.objects(0)
    found = Detections(true.boxes, torch.full((len(true),), score), true.classes, true.outlines)
    pictures.save(tmp_path / "found.png", images, [0], [found])
    image, found_view, true_view = columns(tmp_path / "found.png")
    changed = lambda view: np.abs(view - image).sum(2) > 0
    if score < pictures.MIN_SCORE:
        assert not changed(found_view).any()
        return
    scale = pictures.HEIGHT / 32
    x0, y0, x1, y1 = (scale * true.boxes[0]).tolist()
    inside = changed(found_view)[int(y0) : int(y1), int(x0) : int(x1)]
    assert inside.mean() > 0.3
    assert (changed(found_view) ^ changed(true_view)).mean() < 0.05  # they differ by the score's digits
