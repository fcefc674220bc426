"""Query crops with the rows of the dictionary that a run chose as their positives: pseudo-labels for the eye.
Which rows match is the methods' and matching.py's business; how good they are in numbers is in monitor/labels.py."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mls.config import Config, MLSOptions
from mls.core import methods
from mls.core.method import Method
from mls.data import Batch, Source
from mls.data.augment import Augment
from mls.data.crops import CropDataset, UnreadableImage, cut, decode
from mls.data.loader import steps_per_epoch
from mls.data.sources import build_source
from mls.engine import Run
from mls.engine.checkpoint import Checkpoints
from mls.engine.schedule import epoch_of
from mls.engine.trainer import method_state, watched_labels
from mls.errors import CheckpointError, DataError
from mls.streams import generator

if TYPE_CHECKING:
    from collections.abc import Callable

Pixels = UInt8[np.ndarray, "height width 3"]

CELL, FRAME, GAP, MARGIN, CAPTION = 96, 3, 6, 10, 18  # pixels of the drawn picture
RED, YELLOW, GREEN, INK = "#d62728", "#f2b701", "#1b7f3b", "#222222"


@dataclass(frozen=True)
class GalleryRow:
    """One query crop and its matches, nearest first."""

    query: Pixels
    matches: list[Pixels]
    scores: list[float]  # cosines
    shared: list[bool] | None  # has the match's image a true label in common with the query's? None without labels
    query_id: int
    match_ids: list[int]


def gallery(
    run: str | Path | Run, queries: int = 8, matches: int = 10, warn: Callable[[str], None] = print
) -> list[GalleryRow]:
    """Some query crops of the run's present epoch and the dictionary rows nearest to them.

    Which rows these are is the method's to say (`Method.matches`): MLS gets no more than `objective.k`, because no more
    are positives. Rows of the query's own image are left out: that a network finds another crop of the same image says
    nothing.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    config = run.config
    state = Checkpoints(run.checkpoints, config.engine.keep_last).newest(warn)
    if state is None:
        raise CheckpointError(f"{run.path} has no checkpoint yet, so no crops can be shown: wait until one is saved")
    if state["step"] == 0:
        raise CheckpointError(f"{run.path} has not been trained yet: train for at least one step")
    source = build_source(config.data)
    labels = watched_labels(source)
    method = restore(config, state, labels)
    epoch = epoch_of(state["step"], steps_per_epoch(source, config))
    batch = _query_crops(source, method, epoch, queries)
    augment = Augment(
        config.augment,
        config.run.seed,
        torch.device("cpu"),
        channels_last=False,
        positions=method.views().positions,
    )
    found = method.matches(augment(batch), matches)
    if found is None:
        raise CheckpointError(f"{config.objective.method} keeps no crops that could match: {run.path} has no gallery")
    lines = []
    for number, (crop, image) in enumerate(zip(batch.crops[0], batch.ids, strict=True)):
        ids, boxes, scores = found.ids[number], found.boxes[number], found.scores[number]
        shared = None if labels is None else ((labels[ids] * labels[image]).sum(1) > 0).tolist()
        pictures = [_pixels(row_crop(source, config, int(i), box)) for i, box in zip(ids, boxes, strict=True)]
        lines.append(GalleryRow(_pixels(crop), pictures, scores.tolist(), shared, int(image), ids.tolist()))
    return lines


def meaning(config: Config) -> str:
    """What a match is in this run, in words.

    >>> meaning(Config())
    'the rows chosen as its positives'
    """
    chosen = isinstance(config.objective, MLSOptions) and config.objective.pseudo_labels == "matched"
    return "the rows chosen as its positives" if chosen else "its nearest rows (this run takes no positives from them)"


def row_crop(source: Source, config: Config, image: int, box: Float[Tensor, "4"]) -> UInt8[Tensor, "3 size size"]:
    """The key crop behind a row, cut again from its image with the box that the row remembers."""
    if image >= len(source):
        raise DataError(
            f"the run has seen image {image}, {source.name} has {len(source)} now: "
            "bring back the images that the run was trained on"
        )
    try:
        pixels = decode(source.read(image))
    except (UnreadableImage, OSError) as error:
        raise DataError(f"{source.describe(image)} cannot be read any more ({error}): bring it back") from None
    height, width = pixels.shape[1:]
    share = torch.where(box.isnan(), torch.tensor([0.0, 0.0, 1.0, 1.0]), box)
    x0, y0, x1, y1 = (share.double() * torch.tensor([width, height, width, height])).round().int().tolist()
    return cut(pixels, (y0, x0, y1 - y0, x1 - x0), config.augment.size)


def restore(config: Config, state: dict[str, Any], labels: Tensor | None = None) -> Method:
    """The method as the checkpoint left it, on the CPU. `model.weights` may be gone by now, and is not needed."""
    method = methods.build(replace(config, model=replace(config.model, weights=None)), image_labels=labels)
    method.load_state_dict(method_state(state))
    return method.eval()


def _query_crops(source: Source, method: Method, epoch: int, queries: int) -> Batch:
    """The crops that these images have in this epoch; the images are the same in every epoch."""
    config = method.config
    chosen = torch.randperm(len(source), generator=generator(config.run.seed, "gallery"))[:queries]
    crops = CropDataset(source, config.augment, config.run.seed, plan=method.views())
    return crops.__getitems__([(epoch, int(i)) for i in chosen])


def _pixels(image: UInt8[Tensor, "3 height width"]) -> Pixels:
    return image.permute(1, 2, 0).contiguous().numpy()


def draw(rows: list[GalleryRow]) -> Image.Image:
    """One line a query: its crop framed red, its matches framed yellow with their cosines below; a green tick where
    the images share a true label."""
    pitch = CELL + 2 * FRAME + GAP
    across = 1 + max((len(row.matches) for row in rows), default=0)
    width = 2 * MARGIN + across * pitch - GAP + 2 * GAP  # the query stands a little apart
    picture = Image.new("RGB", (width, 2 * MARGIN + len(rows) * (pitch + CAPTION) - GAP), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    for line, row in enumerate(rows):
        top = MARGIN + line * (pitch + CAPTION)
        _frame(picture, pen, row.query, (MARGIN, top), RED)
        for number, (match, score) in enumerate(zip(row.matches, row.scores, strict=True)):
            left = MARGIN + (number + 1) * pitch + 2 * GAP
            _frame(picture, pen, match, (left, top), YELLOW)
            middle, below = left + FRAME + CELL // 2, top + CELL + 2 * FRAME + CAPTION // 2
            pen.text((middle, below), f"{score:.2f}", fill=INK, font=font, anchor="mm")
            if row.shared is not None and row.shared[number]:
                x, y = middle + 20, below
                pen.line([(x, y), (x + 3, y + 4), (x + 10, y - 5)], fill=GREEN, width=2)
    return picture


def _frame(picture: Image.Image, pen: ImageDraw.ImageDraw, crop: Pixels, corner: tuple[int, int], colour: str) -> None:
    left, top = corner
    pen.rectangle([left, top, left + CELL + 2 * FRAME - 1, top + CELL + 2 * FRAME - 1], fill=colour)
    picture.paste(cell(crop), (left + FRAME, top + FRAME))


def cell(crop: Pixels) -> Image.Image:
    """A crop in the size of a cell: the pixels of tiny crops stay visible, larger ones are smoothed."""
    tiny = max(crop.shape[:2]) < CELL
    return Image.fromarray(crop).resize((CELL, CELL), Image.Resampling.NEAREST if tiny else Image.Resampling.BILINEAR)
