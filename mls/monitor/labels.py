"""How good the pseudo-labels are, where true labels exist: measured beside chance, never used for training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mls.monitor.moments import Crop, Match, Moment, Query

AGES = 4  # groups of matches by age, of the same size


@torch.no_grad()
def label_quality(
    labels: Float[Tensor, "images classes"],
    query_ids: Int64[Tensor, "batch"],
    matched_ids: Int64[Tensor, "batch k"],
    row_ids: Int64[Tensor, "rows"],
) -> dict[str, float]:
    """overlap: mean cosine of a query's true labels and its matches'; precision: the share of matches that share a
    class with the query. `…_chance`: the same over all rows of the dictionary. A query may have fewer matches than
    others: -1 stands for none."""
    found = matched_ids >= 0
    if not found.any():
        return {}
    query = labels[query_ids]
    rows = labels[row_ids]
    unit_query, unit_rows = F.normalize(query, dim=1), F.normalize(rows, dim=1)
    matched = labels[matched_ids.clamp(min=0)]  # [batch, k, classes]
    cosines = (F.normalize(matched, dim=2) * unit_query[:, None]).sum(2)
    shared = (matched * query[:, None]).sum(2) > 0
    return {
        "labels/overlap": float(cosines[found].mean()),
        "labels/overlap_chance": float((unit_query @ unit_rows.T).mean()),
        "labels/precision": float(shared[found].float().mean()),
        "labels/precision_chance": float(((query @ rows.T) > 0).float().mean()),
    }


@dataclass(frozen=True)
class LabelStatistics:
    """Of the first 1, 2, … matches, means over the queries that have labels and matches. A row is relevant where its
    image has a class in common with the query's."""

    queries: int
    precision: list[float]  # share of the matches that is relevant
    recall: list[float]  # share of all relevant rows that is among the matches
    pushed_away: list[float]  # share of all other rows, which a loss takes for negatives, that is relevant
    dominance: list[float]  # share of the matches that has the class which most of them have
    chance: float  # precision of random rows
    dominance_chance: list[float]  # of as many random rows
    by_age: list[tuple[int, int, float]]  # a part of the matches each, the youngest first: ages from, to, precision
    against_precision: dict[str, float]  # rank correlation over the queries of a statistic that needs no labels


def chosen(moment: Moment, labels_from: str, k: int) -> list[list[Match]]:
    """For each query the rows that `objective.labels_from` and `objective.k` make its positives."""
    if labels_from not in ("union", "intersection"):
        memory = {"backbone": "features", "projection": "projections"}.get(labels_from, labels_from)
        return [query.matches[memory][:k] for query in moment.queries]
    found = []
    for query in moment.queries:
        first, second = (
            {match[:3]: match for match in query.matches[memory][:k]}  # id, box and age tell rows apart
            for memory in ("features", "projections")
        )
        both = {**second, **first} if labels_from == "union" else {row: first[row] for row in first if row in second}
        found.append(sorted(both.values(), key=lambda match: -(match.percentile or 0.0)))
    return found


@dataclass(frozen=True)
class _Judged:
    """The matches of a query whose images have labels, and the random rows of other images beside them."""

    matches: list[Match]
    relevant: Bool[Tensor, " matches"]
    classes: Float[Tensor, "matches classes"]
    random_relevant: Bool[Tensor, " random"]
    random_classes: Float[Tensor, "random classes"]


def label_statistics(
    moment: Moment,
    matches: Sequence[Sequence[Match]],
    labels: Float[Tensor, "images classes"],
    by_query: Mapping[str, Sequence[float | None]] = MappingProxyType({}),
    all_rows: Sequence[Crop] | None = None,
) -> LabelStatistics | None:
    """None where no query has labels, and a match and a random row that have some. An image whose labels are NaN has
    none. `by_query`: further statistics to compare with the precision, a value for each query. How many rows are
    relevant is the share of the moment's random rows, unless `all_rows` of the dictionary are given."""
    random = torch.tensor([crop.id for crop in all_rows or moment.random])
    judged = [_judge(query, found, random, labels) for query, found in zip(moment.queries, matches, strict=True)]
    known = [one for one in judged if one is not None]
    if not known:
        return None
    longest = max(len(one.matches) for one in known)
    curves = torch.stack(
        [_curves(one, longest, None if all_rows else moment.rows) for one in known]
    ).double()  # [queries, curves, longest]
    precision, recall, pushed_away, dominance, by_chance = curves.nanmean(0).tolist()
    values = {"score": _means(matches, "score"), "age": _means(matches, "age"), **by_query}
    values["dominance"] = _spread(judged, curves[:, 3, -1])
    if all(len(query.matches) > 1 for query in moment.queries):
        values["agreement of memories"] = [_agreement(query, moment.k) for query in moment.queries]
    correlations = {name: _correlation(value, _spread(judged, curves[:, 0, -1])) for name, value in values.items()}
    return LabelStatistics(
        queries=len(known),
        precision=precision,
        recall=recall,
        pushed_away=pushed_away,
        dominance=dominance,
        chance=float(torch.stack([one.random_relevant.double().mean() for one in known]).mean()),
        dominance_chance=by_chance,
        by_age=_by_age(known),
        against_precision={name: value for name, value in correlations.items() if value is not None},
    )


def _judge(
    query: Query, found: Sequence[Match], random: Int64[Tensor, "rows"], labels: Float[Tensor, "images classes"]
) -> _Judged | None:
    has = lambda images: ~labels[images].isnan().any(-1)
    matches = [match for match in found if has(match.id)]
    random = random[(random != query.id) & has(random)]
    if not has(query.id) or not labels[query.id].any() or not matches or not len(random):
        return None
    rows, others = labels[[match.id for match in matches]], labels[random]
    relevant, random_relevant = ((one * labels[query.id]).sum(1) > 0 for one in (rows, others))
    return _Judged(matches, relevant, rows, random_relevant, others)


def _curves(one: _Judged, longest: int, rows: int | None) -> Float[Tensor, "curves longest"]:
    """Precision, recall, pushed away, dominance, dominance by chance; the last values go on where matches end."""
    count = torch.arange(1, len(one.matches) + 1)
    rows = rows or len(one.random_relevant)
    hits, all_relevant = one.relevant.cumsum(0), one.random_relevant.double().mean() * rows
    all_relevant = all_relevant.clamp(min=float(hits[-1]))
    recall = hits / all_relevant  # NaN where no row is relevant
    pushed_away = (all_relevant - hits) / (rows - count).clamp(min=1)
    dominance, by_chance = (
        classes.cumsum(0).amax(1)[: len(count)] / count[: len(classes)]
        for classes in (one.classes, one.random_classes[: len(count)])
    )
    curves = [hits / count, recall, pushed_away, dominance, by_chance]
    return torch.stack([torch.cat([curve, curve[-1:].expand(longest - len(curve))]) for curve in curves])


def _by_age(known: Sequence[_Judged]) -> list[tuple[int, int, float]]:
    ages = torch.tensor([match.age for one in known for match in one.matches])
    relevant = torch.cat([one.relevant for one in known]).double()
    order = ages.argsort(stable=True)
    parts = [part for part in order.tensor_split(AGES) if len(part)]
    return [(int(ages[part].min()), int(ages[part].max()), float(relevant[part].mean())) for part in parts]


def _means(matches: Sequence[Sequence[Match]], name: str) -> list[float | None]:
    return [fmean(getattr(match, name) for match in found) if found else None for found in matches]


def _agreement(query: Query, k: int) -> float:
    """The share of the rows that the first two memories both match."""
    first, second = ({match[:3] for match in found[:k]} for found in list(query.matches.values())[:2])
    return len(first & second) / max(1, min(len(first), len(second)))


def _spread(judged: Sequence[_Judged | None], values: Float[Tensor, " known"]) -> list[float | None]:
    """A value for each query, None for those that are not known."""
    rest = iter(values.tolist())
    return [None if one is None else next(rest) for one in judged]


def _correlation(first: Sequence[float | None], second: Sequence[float | None]) -> float | None:
    """Spearman's, over the queries that have both; None where one of them is constant."""
    from scipy.stats import spearmanr

    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    if len(pairs) < 3 or any(len(set(side)) < 2 for side in zip(*pairs, strict=True)):
        return None
    found: Any = spearmanr([a for a, _ in pairs], [b for _, b in pairs])
    return float(found.statistic)
