"""What other settings would have chosen as positives from a saved dictionary: the rows of a run's checkpoint, matched
anew by each memory and each number of positives. It scores labels. What a network learns from them is another question,
which only a training answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from mls.config import Config, KnnMoCoOptions, MLSOptions, MoCoOptions
from mls.core.method import Nearest
from mls.core.neighbour_lists import NeighbourLists
from mls.data import Source
from mls.data.loader import steps_per_epoch
from mls.data.sources import build_source, hash_of_images
from mls.engine import Run
from mls.engine.checkpoint import Checkpoints
from mls.engine.gallery import restore
from mls.engine.images import accept_other_images
from mls.engine.schedule import epoch_of
from mls.engine.trainer import watched_labels
from mls.errors import CheckpointError, DataError
from mls.monitor.labels import LabelStatistics, chosen, label_statistics
from mls.monitor.matches import MOST, MomentTaker, matches_of
from mls.monitor.moments import Crop, Match, Moment
from mls.monitor.nuisance import Nuisance, Thumbnails, nuisances

MEMORIES = ("backbone", "projection", "union", "intersection")
NOTE = (
    "These are scores of labels, chosen once from the dictionary of one checkpoint, not of trainings: a run with other "
    "labels would have become another network with another dictionary. Rows of the query's own image are left out, and "
    "others stand in their place; training counts them among the k, unless dictionary.own_rows=exclude."
)


@dataclass(frozen=True)
class Setting:
    labels_from: str  # of MEMORIES, or the file of neighbour lists
    k: int
    matches: float  # of a query, on average
    labels: LabelStatistics | None  # None: the images have no labels
    nuisances: list[Nuisance]


@dataclass(frozen=True)
class Replay:
    run: str
    step: int
    rows: int  # of the dictionary
    queries: int
    note: str
    settings: list[Setting]


def replay(
    run: Run,
    counts: Sequence[int],
    memories: Sequence[str],
    lists: Sequence[Path] = (),
    say: Callable[[str], None] = print,
) -> Replay:
    """Every memory and every file of neighbour lists (`mls regions`) with each number of positives."""
    source = build_source(run.config.data)
    moment, rows = _moment(run, source, max(counts), lists, say)
    thumbnails, labels = Thumbnails.of_moment(moment, source), watched_labels(source)
    settings = []
    for memory in [*memories, *map(str, lists)]:
        for k in sorted(counts):
            found = chosen(moment, memory, k)
            table = nuisances(moment, found, thumbnails, mirrored=run.config.augment.flip > 0)
            by_query = {f"{row.name} percentile": row.by_query for row in table}
            scored = None if labels is None else label_statistics(moment, found, labels.cpu(), by_query, rows)
            mean = sum(map(len, found)) / max(1, len(found))
            settings.append(Setting(memory, k, mean, scored, table))
    return Replay(run.name, moment.step, moment.rows, len(moment.queries), NOTE, settings)


def _moment(
    run: Run, source: Source, k: int, lists: Sequence[Path], say: Callable[[str], None]
) -> tuple[Moment, list[Crop]]:
    """What the checkpoint's dictionary holds nearest to the fixed queries, and all its rows."""
    if k > MOST:
        raise CheckpointError(f"--k {k} is more than the {MOST} matches that are looked at: give {MOST} or fewer")
    config = _with_positives(run.config, k)
    state = Checkpoints(run.checkpoints, 1).newest(say)
    if state is None:
        raise CheckpointError(f"{run.path} has no checkpoint yet, so nothing can be replayed: wait until one is saved")
    accept_other_images(run.path, state, source, accept=False)
    method = restore(config, state, watched_labels(source))
    taker = MomentTaker(config, source, method.views(), torch.device("cpu"))
    moment = taker(method, state["step"], epoch_of(state["step"], steps_per_epoch(source, config)))
    if moment is None:
        raise CheckpointError(f"the dictionary of {run.path} is empty: train for at least one step")
    matched = method.matches(taker.augment(taker.crops), 1)
    assert matched is not None  # as there is a moment
    rows = [Crop(image, (0.0, 0.0, 1.0, 1.0)) for image in matched.ids.tolist()]
    for file in lists:
        found = _lists_of(file, source).among(taker.crops.ids, matched.ids, k)
        listed = Nearest(found.indices, found.scores, found.scores.new_empty(0))
        moment = _with(moment, str(file), matches_of(matched, listed))
    return moment, rows


def _with_positives(config: Config, k: int) -> Config:
    """As MLS with k positives, whatever the run took."""
    options = config.objective
    if type(options) in (MLSOptions, KnnMoCoOptions):
        return replace(config, objective=replace(options, k=k))
    if type(options) is MoCoOptions:
        shared = {name.name: getattr(options, name.name) for name in fields(MoCoOptions) if name.name != "method"}
        return replace(config, objective=MLSOptions(k=k, **shared))
    raise CheckpointError(
        f"{options.method} keeps no dictionary of features and projections: replay a run of mls, knn_moco or moco_v2"
    )


def _lists_of(file: Path, source: Source) -> NeighbourLists:
    lists = NeighbourLists.open(file.expanduser())
    if lists.identity.get("images") != hash_of_images(source):
        raise DataError(f"the neighbour lists in {file} are not of the images in {source.name}: make them of these")
    return lists


def _with(moment: Moment, name: str, matches: list[list[Match]]) -> Moment:
    queries = [
        replace(query, matches={**query.matches, name: [match for match in found if match.id != query.id]})
        for query, found in zip(moment.queries, matches, strict=True)
    ]
    return replace(moment, queries=queries)
