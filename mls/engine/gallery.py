"""Query crops with the rows of the dictionary that a run chose as their positives: pseudo-labels for the eye, from a
moment of the run (mls/monitor/moments.py). How they are drawn is in frozen/match_picture.py, how good they are in
monitor/labels.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from mls.config import Config
from mls.core import methods
from mls.core.method import Method
from mls.data import Source
from mls.data.crops import UnreadableImage, cut, decode
from mls.data.loader import steps_per_epoch
from mls.data.sources import build_source
from mls.engine import Run
from mls.engine.checkpoint import Checkpoints
from mls.engine.images import accept_other_images
from mls.engine.schedule import epoch_of
from mls.engine.trainer import method_state, watched_labels
from mls.errors import CheckpointError, DataError
from mls.frozen.match_picture import RED, YELLOW, Box, GalleryRow, Pixels, boxed, draw, file_name
from mls.monitor import moments
from mls.monitor.matches import MomentTaker
from mls.monitor.moments import Moment

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def gallery(
    run: str | Path | Run, queries: int = 8, matches: int = 10, warn: Callable[[str], None] = print
) -> list[GalleryRow]:
    """Some of the fixed queries and the rows nearest to them at the run's last moment.

    Which rows these are is the method's to say (`Method.matches`): MLS gets no more than `objective.k`, because no more
    are positives. Rows of the query's own image are left out: that a network finds another crop of the same image says
    nothing.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    config = run.config
    source = build_source(config.data)
    return rows_of(last_moment(run, warn), source, config, watched_labels(source), queries, matches)


def drawn(moment: Moment, source: Source, config: Config, labels: Tensor | None) -> Pixels:
    return np.asarray(draw(rows_of(moment, source, config, labels)))


def rows_of(
    moment: Moment, source: Source, config: Config, labels: Tensor | None, queries: int = 8, matches: int = 10
) -> list[GalleryRow]:
    lines = []
    for query in moment.queries[:queries]:
        found = next(iter(query.matches.values()))[:matches]
        ids, boxes = [match.id for match in found], [match.box for match in found]
        pictures = [_pixels(row_crop(source, config, match.id, match.box)) for match in found]
        shared = None if labels is None else ((labels[ids] * labels[query.id]).sum(1) > 0).tolist()
        scores, shown = [match.score for match in found], _pixels(row_crop(source, config, query.id, query.box))
        name = file_name(source.describe(query.id))
        lines.append(GalleryRow(shown, pictures, scores, shared, query.id, ids, query.box, boxes, name))
    return lines


def last_moment(run: Run, warn: Callable[[str], None] = print) -> Moment:
    """The last one that the run kept; of a run without any, such as an older one, what its checkpoint gives."""
    if kept := moments.read(run.path, warn):
        return kept[-1]
    config = run.config
    state = Checkpoints(run.checkpoints, config.engine.keep_last).newest(warn)
    if state is None:
        raise CheckpointError(f"{run.path} has no checkpoint yet, so no crops can be shown: wait until one is saved")
    if state["step"] == 0:
        raise CheckpointError(f"{run.path} has not been trained yet: train for at least one step")
    source = build_source(config.data)
    accept_other_images(run.path, state, source, accept=False)
    labels = watched_labels(source)
    method = restore(config, state, labels)
    take_moment = MomentTaker(config, source, method.views(), torch.device("cpu"), labels=labels)
    moment = take_moment(method, state["step"], epoch_of(state["step"], steps_per_epoch(source, config)))
    if moment is None:
        raise CheckpointError(f"{config.objective.method} keeps no crops that could match: {run.path} has no gallery")
    return moment


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


def row_crop(source: Source, config: Config, image: int, box: Box) -> UInt8[Tensor, "3 size size"]:
    """The crop behind a row, cut again from its image with the box that the row remembers."""
    pixels = _image(source, image)
    height, width = pixels.shape[1:]
    x0, y0, x1, y1 = (round(share * side) for share, side in zip(box, (width, height) * 2, strict=True))
    return cut(pixels, (y0, x0, max(1, y1 - y0), max(1, x1 - x0)), config.augment.size)


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


def restore(config: Config, state: dict[str, Any], labels: Tensor | None = None) -> Method:
    """The method as the checkpoint left it, on the CPU. `model.weights` may be gone by now, and is not needed."""
    method = methods.build(replace(config, model=replace(config.model, weights=None)), image_labels=labels)
    method.load_state_dict(method_state(state))
    return method.eval()


def _pixels(image: UInt8[Tensor, "3 height width"]) -> Pixels:
    return image.permute(1, 2, 0).contiguous().numpy()
