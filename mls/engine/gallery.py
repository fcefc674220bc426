"""Query crops with the rows of the dictionary that a run chose as their positives: pseudo-labels for the eye.
Which rows match is the method's to say; how they are drawn is in frozen/match_picture.py, how good they are in
monitor/labels.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, UInt8
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
from mls.frozen.match_picture import RED, YELLOW, GalleryRow, Pixels, boxed
from mls.streams import generator

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


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
        config.augment, config.run.seed, torch.device("cpu"), channels_last=False, positions=method.views().positions
    )
    found = method.matches(augment(batch), matches)
    if found is None:
        raise CheckpointError(f"{config.objective.method} keeps no crops that could match: {run.path} has no gallery")
    lines = []
    for number, (crop, image) in enumerate(zip(batch.crops[0], batch.ids, strict=True)):
        ids, boxes, scores = found.ids[number], found.boxes[number], found.scores[number]
        shared = None if labels is None else ((labels[ids] * labels[image]).sum(1) > 0).tolist()
        pictures = [_pixels(row_crop(source, config, int(i), box)) for i, box in zip(ids, boxes, strict=True)]
        places = batch.boxes[0][number].tolist(), _whole_where_unknown(boxes).tolist()
        lines.append(GalleryRow(_pixels(crop), pictures, scores.tolist(), shared, int(image), ids.tolist(), *places))
    return lines


def in_whole_images(rows: Sequence[GalleryRow], source: Source) -> list[GalleryRow]:
    """The same rows, each crop as a box in its image, red for the query, yellow for its matches (the paper's way)."""
    found = []
    for row in rows:
        assert row.query_box is not None and row.match_boxes is not None
        query = boxed(_pixels(_image(source, row.query_id)), [(row.query_box, RED)])
        places = zip(row.match_ids, row.match_boxes, strict=True)
        matches = [boxed(_pixels(_image(source, image)), [(box, YELLOW)]) for image, box in places]
        found.append(replace(row, query=query, matches=matches))
    return found


def meaning(config: Config) -> str:
    """What a match is in this run, in words.

    >>> meaning(Config())
    'the rows chosen as its positives'
    """
    chosen = isinstance(config.objective, MLSOptions) and config.objective.pseudo_labels == "matched"
    return "the rows chosen as its positives" if chosen else "its nearest rows (this run takes no positives from them)"


def row_crop(source: Source, config: Config, image: int, box: Float[Tensor, "4"]) -> UInt8[Tensor, "3 size size"]:
    """The key crop behind a row, cut again from its image with the box that the row remembers."""
    pixels = _image(source, image)
    height, width = pixels.shape[1:]
    share = _whole_where_unknown(box)
    x0, y0, x1, y1 = (share.double() * torch.tensor([width, height, width, height])).round().int().tolist()
    return cut(pixels, (y0, x0, y1 - y0, x1 - x0), config.augment.size)


def _image(source: Source, image: int) -> UInt8[Tensor, "3 height width"]:
    if image >= len(source):
        raise DataError(
            f"the run has seen image {image}, {source.name} has {len(source)} now: "
            "bring back the images that the run was trained on"
        )
    try:
        return decode(source.read(image))
    except (UnreadableImage, OSError) as error:
        raise DataError(f"{source.describe(image)} cannot be read any more ({error}): bring it back") from None


def _whole_where_unknown(boxes: Float[Tensor, "*rows 4"]) -> Float[Tensor, "*rows 4"]:
    return torch.where(boxes.isnan(), torch.tensor([0.0, 0.0, 1.0, 1.0]), boxes)


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
