"""What other settings would have chosen as positives from a saved dictionary: the rows of a run's checkpoint, matched
anew by each memory and each number of positives. It scores labels. What a network learns from them is another question,
which only a training answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean, median

import torch
from torch import Tensor

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
from mls.monitor.matches import MOST, MomentTaker, matches_of, of_other_view, queries_of
from mls.monitor.moments import Crop, Match, Moment
from mls.monitor.nuisance import Nuisance, Thumbnails, nuisances

MEMORIES = ("backbone", "projection", "union", "intersection", "regions")
NAMES = {"backbone": "features", "projection": "projections", "regions": "regions"}  # of memories that a moment knows
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
    percentile: float | None  # of the matches' scores among those of all rows, the median; lists have none
    two_views: float | None  # share of the rows that both views of an image choose; a list has one for both
    own: float | None  # share of the query's own image among the k nearest rows, were they not left out
    hub: int  # queries that choose the row which most of them choose
    labels: LabelStatistics | None  # None: the images have no labels
    nuisances: list[Nuisance]


@dataclass(frozen=True)
class Replay:
    run: str
    step: int
    rows: int  # of the dictionary
    queries: int
    note: str
    memories: dict[str, float]  # by k the share of the rows that backbone and projection both choose
    settings: list[Setting]


def read(path: Path) -> Replay | None:
    """What `mls replay` has left in a run's folder; None: nothing, or something else."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Replay).validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


@dataclass(frozen=True)
class _Held:
    """What a checkpoint holds nearest to the fixed queries, by each memory and list."""

    first: Moment
    second: Moment  # of the other view of each image
    rows: list[Crop]  # all of the dictionary
    own: dict[tuple[str, int], float]  # by memory and k


def replay(
    run: Run,
    counts: Sequence[int],
    memories: Sequence[str] | None = None,
    lists: Sequence[Path] = (),
    say: Callable[[str], None] = print,
) -> Replay:
    """Every memory and every file of neighbour lists (`mls regions`) with each number of positives. By default the
    memories are those that the run could have taken its labels from."""
    source, counts = build_source(run.config.data), sorted(counts)
    held = _held(run, source, counts, lists, say)
    known, listed = held.first.queries[0].matches, [str(path) for path in lists]
    if memories is None:
        memories = [name for name in ("regions", "backbone", "projection") if NAMES[name] in known]
    if "regions" in memories and "regions" not in known:
        why = f"{run.path} holds no neighbour lists (of its own it has some with objective.labels_from=regions, after "
        raise CheckpointError(f"{why}the warm-up): name a file of `mls regions` with --region")
    thumbnails = Thumbnails.of_moment(held.first, source, run.config.augment.flip > 0)
    labels = watched_labels(source)
    labels = None if labels is None else labels.cpu()
    asked = [(memory, k) for memory in [*memories, *listed] for k in counts]
    settings = [_setting(held, memory, k, thumbnails, labels) for memory, k in asked]
    both = {str(k): _shared(chosen(held.first, "backbone", k), chosen(held.first, "projection", k)) for k in counts}
    first = held.first
    return Replay(run.name, first.step, first.rows, len(first.queries), NOTE, both, settings)


def _setting(held: _Held, memory: str, k: int, thumbnails: Thumbnails, labels: Tensor | None) -> Setting:
    found = chosen(held.first, memory, k)
    table = nuisances(held.first, found, thumbnails)
    by_query = {f"{row.name} percentile": row.by_query for row in table}
    places = [match.percentile for matches in found for match in matches if match.percentile is not None]
    listed = memory not in MEMORIES or memory == "regions"
    rows = Counter(match[:3] for matches in found for match in matches)
    return Setting(
        labels_from=memory,
        k=k,
        matches=sum(map(len, found)) / len(found),
        percentile=median(places) if places else None,
        two_views=None if listed else _shared(found, chosen(held.second, memory, k)),
        own=held.own.get((NAMES.get(memory, ""), k)),
        hub=max(rows.values(), default=0),
        labels=None if labels is None else label_statistics(held.first, found, labels, by_query, held.rows),
        nuisances=table,
    )


def _shared(first: Sequence[Sequence[Match]], second: Sequence[Sequence[Match]]) -> float:
    """The share of a query's rows in the first that are its rows in the second, too."""
    shares = [
        len({match[:3] for match in one} & {match[:3] for match in other}) / max(1, len(one))
        for one, other in zip(first, second, strict=True)
    ]
    return fmean(shares)


def _held(run: Run, source: Source, counts: Sequence[int], lists: Sequence[Path], say: Callable[[str], None]) -> _Held:
    if (most := max(counts)) > MOST:
        raise CheckpointError(f"--k {most} is more than the {MOST} matches that are looked at: give {MOST} or fewer")
    config = _with_positives(run.config, most)
    state = Checkpoints(run.checkpoints, 1).newest(say)
    if state is None:
        raise CheckpointError(f"{run.path} has no checkpoint yet, so nothing can be replayed: wait until one is saved")
    accept_other_images(run.path, state, source, accept=False)
    method = restore(config, state, watched_labels(source))
    taker = MomentTaker(config, source, method.views(), torch.device("cpu"))
    moment = taker(method, state["step"], epoch_of(state["step"], steps_per_epoch(source, config)))
    if moment is None:
        raise CheckpointError(f"the dictionary of {run.path} is empty: train for at least one step")
    views = taker.augment(taker.crops)
    other, by_k = method.matches(of_other_view(views), MOST), {k: method.matches(views, k) for k in counts}
    matched = by_k[most]
    assert other is not None and matched is not None  # as there is a moment
    second = replace(moment, queries=queries_of(views, other))
    own = {(name, k): near.own for k, one in by_k.items() if one for name, near in one.nearest.items()}
    own = {} if config.dictionary.own_rows == "exclude" else {key: own[key] for key in own if key[0] != "regions"}
    rows = [Crop(image, (0.0, 0.0, 1.0, 1.0)) for image in matched.ids.tolist()]
    for file in lists:
        found = _lists_of(file, source).among(views.ids, matched.ids, most)
        listed = Nearest(found.indices, found.scores, found.scores.new_empty(0))
        moment = _with(moment, str(file), matches_of(matched, listed))
    return _Held(moment, second, rows, own)


def _with_positives(config: Config, k: int) -> Config:
    """As MLS with k positives, whatever the run took."""
    options = config.objective
    if type(options) in (MLSOptions, KnnMoCoOptions):
        return replace(config, objective=replace(options, k=k))
    if type(options) is MoCoOptions:
        shared = {name.name: getattr(options, name.name) for name in fields(MoCoOptions) if name.name != "method"}
        return replace(config, objective=MLSOptions(k=k, **shared))
    raise CheckpointError(
        f"{options.method} does not match features and projections of a dictionary: replay a run of mls, knn_moco or "
        "moco_v2"
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
