"""Metrics of scored classes, as shares (0 to 1). Average precision is the area under the precision-recall steps, ties
counted as one threshold: scikit-learn's definition, for all classes at once. Which metric a protocol reports is decided
in eval/.

In all of them targets above 0 are positive, and entries that are not `known` (annotated) are ignored."""

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float64, Int64, Num
from torch import Tensor

from mls.chunks import rows_within
from mls.errors import DataError

RANKED = 2**24  # entries that are ranked together: sorting them takes about 80 bytes each


@torch.no_grad()
def average_precision(
    scores: Float[Tensor, "items *classes"],
    targets: Num[Tensor, "items *classes"],
    known: Bool[Tensor, "items *classes"] | None = None,
) -> Float64[Tensor, "*classes"]:
    """Of one class, or of each column. A class without positives has 0.

    >>> average_precision(torch.tensor([0.9, 0.8, 0.1]), torch.tensor([1, 0, 1])).item()
    0.8333333333333333
    """
    found = []
    for positive, _, precision in _rankings(scores, targets, known):
        found.append((positive * precision).sum(dim=1) / positive.sum(dim=1).clamp(min=1))
    return torch.cat(found).view(scores.shape[1:])


def mean_average_precision(
    scores: Float[Tensor, "items classes"],
    targets: Num[Tensor, "items classes"],
    skip_empty: bool = True,
    known: Bool[Tensor, "items classes"] | None = None,
) -> float:
    """The mean over classes; those without positives are left out, or count 0. Classes without any known entry are
    always left out. NaN where no class is left.

    >>> mean_average_precision(torch.tensor([[0.9, 0.2], [0.4, 0.1]]), torch.tensor([[1, 0], [0, 0]]))
    1.0
    """
    per_class = average_precision(scores, targets, known)
    counts = (targets > 0) if skip_empty else torch.ones_like(targets, dtype=torch.bool)
    counts = counts if known is None else counts & known
    return per_class[counts.any(dim=0)].mean().item()


def mean_average_precision_by_sample(
    scores: Float[Tensor, "items classes"],
    targets: Num[Tensor, "items classes"],
    known: Bool[Tensor, "items classes"] | None = None,
) -> float:
    """Classes are ranked within each sample; the mean over samples, those without positives left out.

    >>> mean_average_precision_by_sample(torch.tensor([[0.9, 0.2], [0.4, 0.1]]), torch.tensor([[1, 0], [0, 1]]))
    0.75
    """
    return mean_average_precision(scores.T, targets.T, known=None if known is None else known.T)


@torch.no_grad()
def voc_11_point(
    scores: Float[Tensor, "items *classes"],
    targets: Num[Tensor, "items *classes"],
    known: Bool[Tensor, "items *classes"] | None = None,
) -> Float64[Tensor, "*classes"]:
    """VOC 2007's average precision: the mean, over recalls 0, 0.1, ..., 1, of the best precision at that recall or
    above. The VOC devkit takes tied items one by one, in the order they happen to have; here a tie is one threshold.

    >>> voc_11_point(torch.tensor([0.9, 0.8, 0.1]), torch.tensor([1, 0, 1])).item()  # (6 * 1 + 5 * 2/3) / 11
    0.8484848484848484
    """
    found = []
    for positive, hits, precision in _rankings(scores, targets, known):
        total = positive.sum(dim=1, keepdim=True)
        # Multiples of 0.1 in floating point, as in published code: a recall of 3 / 10 does not reach 3 * 0.1.
        recall = hits / total  # NaN, which reaches nothing, where there is no positive
        best = [precision.where(recall >= tenth * 0.1, 0.0).amax(dim=1) for tenth in range(11)]
        found.append(torch.stack(best).mean(dim=0))
    return torch.cat(found).view(scores.shape[1:])


Ranking = Float64[Tensor, "some items"]


def _rankings(scores: Tensor, targets: Tensor, known: Tensor | None) -> Iterator[tuple[Ranking, Ranking, Ranking]]:
    """`_ranking` of some classes at a time, in order, so that memory stays bounded."""
    for name, tensor in {"targets": targets, "known": known}.items():
        if tensor is not None and tensor.shape != scores.shape:
            raise ValueError(
                f"scores have shape {tuple(scores.shape)}, {name} {tuple(tensor.shape)}: both must be the same"
            )
    items = len(scores)
    if items == 0:
        raise DataError("no items were scored: the data set is empty")
    width = rows_within(RANKED, items)
    parts = [t.reshape(items, -1).T.split(width) for t in (scores, targets, known) if t is not None]
    for some_scores, some_targets, *some_known in zip(*parts, strict=True):
        positive = some_targets > 0
        counted = some_known[0] if some_known else torch.ones_like(positive)
        yield _ranking(some_scores, positive & counted, counted)


def _ranking(
    scores: Float[Tensor, "some items"], positive: Bool[Tensor, "some items"], counted: Bool[Tensor, "some items"]
) -> tuple[Ranking, Ranking, Ranking]:
    """For the items in descending order of their scores: whether each is positive, the number of positives up to it,
    and the precision up to it. Items of equal score form a tie, and count up to the end of their tie: a threshold
    accepts all of them."""
    if scores.isnan().any():
        raise DataError(
            "scores hold NaN, so they have no order: look for the non-finite features or weights behind them"
        )
    items = scores.shape[1]
    ordered, order = scores.contiguous().sort(dim=1, descending=True)
    ends = torch.ones_like(order, dtype=torch.bool)
    ends[:, :-1] = ordered[:, :-1] != ordered[:, 1:]
    place = torch.arange(items, device=scores.device).expand_as(order)
    end = place.where(ends, items).flip(1).cummin(dim=1).values.flip(1)
    ranked = positive.gather(1, order).double()
    hits = ranked.cumsum(dim=1).gather(1, end)
    rank = counted.gather(1, order).double().cumsum(dim=1).gather(1, end)
    return ranked, hits, hits / rank.clamp(min=1)


@torch.no_grad()
def f1(
    scores: Float[Tensor, "items classes"],
    targets: Num[Tensor, "items classes"],
    threshold: float = 0.5,
    average: Literal["macro", "micro", "sample"] = "macro",
    known: Bool[Tensor, "items classes"] | None = None,
) -> float:
    """Scores above `threshold` are predictions. The mean of the classes' F1, the F1 of all entries together, or the
    mean of the samples' F1; one with neither positives nor predictions counts 0, as in scikit-learn.

    >>> f1(torch.tensor([[0.9, 0.2], [0.4, 0.1]]), torch.tensor([[1, 0], [1, 0]]), average="micro")
    0.6666666666666666
    """
    positive, predicted = targets > 0, scores > threshold
    if known is not None:
        positive, predicted = positive & known, predicted & known
    over = {"macro": 0, "micro": (0, 1), "sample": 1}[average]
    hits = (positive & predicted).sum(dim=over).double()
    total = positive.sum(dim=over) + predicted.sum(dim=over)
    return (2 * hits / total.clamp(min=1)).mean().item()


def frequency_groups(counts: Int64[Tensor, "classes"], groups: int = 5) -> Int64[Tensor, "classes"]:
    """The group of each class, from 0: classes in ascending order of their training labels, cut into equal parts.

    >>> frequency_groups(torch.tensor([50, 3, 7, 900]), groups=2)
    tensor([1, 0, 0, 1])
    """
    place = counts.argsort(stable=True).argsort()
    return place * groups // len(counts)


def grouped(per_class: Float[Tensor, "classes"], group_of_class: Int64[Tensor, "classes"], groups: int) -> list[float]:
    """The mean of each group, classes with NaN left out. NaN where no class is left.

    >>> grouped(torch.tensor([0.2, 0.4, torch.nan, 0.9]), torch.tensor([0, 0, 1, 1]), groups=2)
    [0.30000001192092896, 0.8999999761581421]
    """
    return [per_class[group_of_class == group].nanmean().item() for group in range(groups)]


@torch.no_grad()
def top1(scores: Float[Tensor, "items classes"], targets: Num[Tensor, "items *classes"]) -> float:
    """The share of items whose best-scored class is right; targets are class numbers or one-hot rows.

    >>> top1(torch.tensor([[0.9, 0.2], [0.4, 0.1]]), torch.tensor([0, 1]))
    0.5
    """
    return topk(scores, targets, k=1)


@torch.no_grad()
def topk(scores: Float[Tensor, "items classes"], targets: Num[Tensor, "items *classes"], k: int) -> float:
    """The share of items whose class is among the k best-scored ones (all of them where there are fewer).

    >>> topk(torch.tensor([[0.9, 0.2, 0.0], [0.4, 0.1, 0.2]]), torch.tensor([0, 1]), k=2)
    0.5
    """
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return (best == _class_numbers(targets)[:, None]).any(dim=1).double().mean().item()


@torch.no_grad()
def top1_by_class(scores: Float[Tensor, "items classes"], targets: Num[Tensor, "items *classes"]) -> float:
    """The mean over classes of the share of a class' items that are right; classes without items are left out.

    >>> top1_by_class(torch.tensor([[0.9, 0.2], [0.8, 0.3], [0.4, 0.1]]), torch.tensor([0, 0, 1]))
    0.5
    """
    truth = _class_numbers(targets)
    right = (scores.argmax(dim=1) == truth).double()
    counts = torch.bincount(truth, minlength=scores.shape[1])
    hits = torch.zeros(len(counts), dtype=torch.float64, device=right.device).index_add_(0, truth, right)
    return (hits[counts > 0] / counts[counts > 0]).mean().item()


def _class_numbers(targets: Num[Tensor, "items *classes"]) -> Int64[Tensor, "items"]:
    return targets if targets.ndim == 1 else targets.argmax(dim=1)
