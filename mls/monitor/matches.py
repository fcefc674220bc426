"""What a method matches at one step, measured for the fixed queries of a moment (moments.py): no state moves, and
nothing is drawn from a stream of the training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mls.config import Config
from mls.core.method import MatchedRows, Method, Nearest
from mls.data import Batch, Source, ViewPlan, Views
from mls.data.augment import Augment
from mls.data.crops import CropDataset
from mls.monitor.moments import LEVELS, Box, Crop, Hub, Labels, Match, Moment, Query, Share
from mls.streams import generator, watched

SEED, EPOCH = 0, 1  # of the queries' crops, the same in every run
RANDOM, HUBS = 200, 12
MOST = 100  # matches of a query that are kept, however many are positives


def moment_epochs(epochs: int, count: int) -> set[int]:
    """The epochs at whose ends up to `count` moments are taken: the last one, and others ever further apart.

    >>> sorted(moment_epochs(200, 6)), moment_epochs(200, 1), moment_epochs(200, 0)
    ([1, 3, 8, 24, 69, 200], {200}, set())
    """
    return set(np.geomspace(epochs, 1, count).round().astype(int).tolist())


class MomentTaker:
    def __init__(
        self,
        config: Config,
        source: Source,
        plan: ViewPlan,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        labels: Float[Tensor, "images classes"] | None = None,
    ) -> None:
        self.source, self.plan, self.labels, self.augmented = source, plan, labels, config.augment
        layout = config.engine.channels_last
        self.augment = Augment(config.augment, SEED, device, layout, dtype, plan.positions)

    @cached_property
    def crops(self) -> Batch:
        """Of the queries: cut once, since they stay the same."""
        crops = CropDataset(self.source, self.augmented, SEED, plan=self.plan)
        return crops.__getitems__([(EPOCH, image) for image in watched(len(self.source))])

    def __call__(self, method: Method, step: int, epoch: int) -> Moment | None:
        """None where the method holds nothing that matches, or its numbers are not finite."""
        began = time.perf_counter()
        views = self.augment(self.crops)
        with evaluating(method), torch.compiler.set_stance("force_eager"):  # compiling for so few images takes longer
            first = method.matches(views, MOST)
            second = None if first is None else method.matches(of_other_view(views), MOST)
        if first is None or second is None or not all(found.all_scores.isfinite().all() for found in by(first)):
            return None
        g, z = first.nearest.get("features"), first.nearest.get("projections")
        return Moment(
            step=step,
            epoch=epoch,
            k=max(found.slots.shape[1] for found in by(first)),
            rows=len(first.ids),
            queries=queries_of(views, first),
            random=_random_rows(first, step),
            scores={
                name: _quantiles(found.all_scores) for name, found in first.nearest.items() if len(found.all_scores)
            },
            hubs={name: _hubs(first, found) for name, found in first.nearest.items()},
            agreement={name: overlap(found, second.nearest[name]) for name, found in first.nearest.items()},
            agreement_of_memories=None if g is None or z is None else overlap(g, z),
            own={name: round(found.own, 4) for name, found in first.nearest.items()},
            labels=None if self.labels is None else labels_by_rank(self.labels, views.ids, first),
            seconds=round(time.perf_counter() - began, 3),
        )


def of_other_view(views: Views) -> Views:
    """The same images, asked about with their second view."""
    return replace(views, images=[views.images[1], views.images[0], *views.images[2:]])


def by(matched: MatchedRows) -> list[Nearest]:
    return list(matched.nearest.values())


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """In evaluation mode; afterwards each part is in its own mode again."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def _boxes(boxes: Float[Tensor, "rows 4"]) -> list[Box]:
    """The whole image where it is not known."""
    known = torch.where(boxes.isnan(), boxes.new_tensor([0.0, 0.0, 1.0, 1.0]), boxes)
    return [(x0, y0, x1, y1) for x0, y0, x1, y1 in np.round(known.double().cpu().numpy(), 4).tolist()]


def queries_of(views: Views, matched: MatchedRows) -> list[Query]:
    ids, boxes = views.ids.tolist(), _boxes(views.boxes[0])
    found = {name: matches_of(matched, nearest) for name, nearest in matched.nearest.items()}
    queries = [Query(ids[i], boxes[i], {name: rows[i] for name, rows in found.items()}) for i in range(len(ids))]
    listed = matched.nearest.get("regions")
    if listed is None or listed.regions is None:
        return queries
    alike = [[(own, other) for own, other in rows] for rows in listed.regions.tolist()]
    return [replace(query, regions=alike[i][: len(query.matches["regions"])]) for i, query in enumerate(queries)]


def matches_of(matched: MatchedRows, nearest: Nearest) -> list[list[Match]]:
    """Of each query; fewer where no more rows were left."""
    slots, scores, every = nearest.slots, nearest.scores.float(), nearest.all_scores.float()
    lower = 100 * torch.searchsorted(every, scores.contiguous()) / max(1, len(every))
    percentiles = np.round(lower.double().cpu().numpy(), 2).tolist()
    ids, ages = matched.ids[slots].tolist(), matched.ages[slots].tolist()
    boxes, written = _boxes(matched.boxes[slots.flatten()]), np.round(scores.double().cpu().numpy(), 4).tolist()
    found = []
    for query, present in enumerate((~scores.isneginf()).tolist()):
        places, line = [place for place, there in enumerate(present) if there], query * slots.shape[1]
        found.append(
            [
                Match(
                    ids[query][place],
                    boxes[line + place],
                    ages[query][place],
                    written[query][place],
                    percentiles[query][place] if len(every) else None,
                )
                for place in places
            ]
        )
    return found


def _random_rows(matched: MatchedRows, step: int) -> list[Crop]:
    slots = torch.randperm(len(matched.ids), generator=generator(SEED, "random rows", step))[:RANDOM]
    slots = slots.to(matched.ids.device)
    return list(map(Crop, matched.ids[slots].tolist(), _boxes(matched.boxes[slots])))


def _quantiles(ordered: Float[Tensor, "some"]) -> list[float]:
    places = [round(level * (len(ordered) - 1)) for level in LEVELS]
    return np.round(ordered[places].double().cpu().numpy(), 4).tolist()


def _hubs(matched: MatchedRows, nearest: Nearest) -> list[Hub]:
    slots, counts = nearest.slots[~nearest.scores.isneginf()].unique(return_counts=True)
    most = counts.sort(descending=True, stable=True).indices[:HUBS]
    rows = slots[most]
    return list(map(Hub, matched.ids[rows].tolist(), _boxes(matched.boxes[rows]), counts[most].tolist()))


def overlap(one: Nearest, other: Nearest) -> Share:
    """The share of a query's matches in `one` that are its matches in `other`, too; by chance: another query's, so that
    rows which everything matches count for nothing."""
    first, second = (nearest.slots.masked_fill(nearest.scores.isneginf(), -1) for nearest in (one, other))
    counts = (first >= 0).sum(1).clamp(min=1)
    both = torch.stack([((rows[:, None, None] == second) & (rows >= 0)[:, None, None]).sum((0, 2)) for rows in first])
    shares = both / counts[:, None]  # [queries, queries]
    total, own = float(shares.sum()), float(shares.diagonal().sum())
    queries = len(shares)
    return Share(round(own / queries, 4), round((total - own) / max(1, queries * (queries - 1)), 4))


def labels_by_rank(
    labels: Float[Tensor, "images classes"], queries: Int64[Tensor, "queries"], matched: MatchedRows
) -> Labels:
    device = labels.device
    ids, queries = matched.ids.to(device), queries.to(device)
    others = ids != queries[:, None]  # [queries, rows]
    shared = ((labels[queries] @ labels[ids].T) > 0) & others
    precision, recall = {}, {}
    for name, nearest in matched.nearest.items():
        there = ~nearest.scores.to(device).isneginf()
        hits = (shared.gather(1, nearest.slots.to(device)) & there).cumsum(1)
        precision[name] = _means(hits / there.cumsum(1))
        recall[name] = _means(hits / shared.sum(1, keepdim=True))
    return Labels(precision, recall, round(float((shared.sum(1) / others.sum(1)).nanmean()), 4))


def _means(values: Float[Tensor, "queries ranks"]) -> list[float]:
    """Over the queries for which there is a value."""
    return np.round(values.nanmean(0).nan_to_num().double().cpu().numpy(), 4).tolist()
