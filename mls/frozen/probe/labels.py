"""Labels of the probes: one or several per image, which of them are annotated, and which training images are held out
or drawn for few-shot probes. No features here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor

from mls.errors import DataError
from mls.frozen.metrics import mean_average_precision, top1
from mls.streams import generator

Metric = Literal["top1", "map"]


@dataclass(frozen=True)
class Labels:
    """Labels of some images: single-label if there are `numbers`, else multi-label."""

    classes: int
    numbers: Int64[Tensor, "images"] | None = None
    positive: Bool[Tensor, "images classes"] | None = None
    known: Bool[Tensor, "images classes"] | None = None  # annotated entries; None: all

    def __len__(self) -> int:
        return len(self.matrix if self.numbers is None else self.numbers)

    @property
    def single(self) -> bool:
        return self.numbers is not None

    @property
    def metric(self) -> Metric:
        return "top1" if self.single else "map"

    @property
    def matrix(self) -> Bool[Tensor, "images classes"]:
        """The positive entries, for multi-label images."""
        assert self.positive is not None
        return self.positive

    def take(self, rows: Int64[Tensor, "some"]) -> Labels:
        parts = {"numbers": self.numbers, "positive": self.positive, "known": self.known}
        return replace(self, **{name: None if part is None else part[rows] for name, part in parts.items()})

    def measure(self, scores: Shaped[Tensor, "images classes"]) -> float:
        """The accuracy, or the mean average precision over the classes that have a positive; NaN for a NaN score."""
        if not bool(torch.isfinite(scores).all()):
            return float("nan")
        if self.numbers is not None:
            return top1(scores, self.numbers)
        return mean_average_precision(scores, self.matrix.to(torch.int8), known=self.known)


def read_labels(labels: Shaped[Tensor, "images ..."], multilabel: bool | None = None) -> Labels:
    """Labels from a tensor. A vector holds class numbers. A matrix of integers holds annotations: +1 present, -1
    absent, 0 not annotated, which is left out of losses, votes and metrics. A matrix of floats or booleans holds 1
    present, 0 absent. A matrix in which every image has exactly one class is single-label unless `multilabel` says.

    >>> read_labels(torch.tensor([2, 0])).numbers
    tensor([2, 0])
    >>> read_labels(torch.tensor([[1, -1], [0, 1]])).known
    tensor([[ True,  True],
            [False,  True]])
    >>> read_labels(torch.tensor([[1.0, 0.0], [1.0, 1.0]])).single
    False
    """
    if len(labels) == 0:
        raise DataError("there are no labels: give the probe at least one image")
    if labels.ndim == 1:
        return _from_numbers(labels, bool(multilabel))
    positive, known = labels > 0, None
    if not labels.is_floating_point() and labels.dtype != torch.bool:
        known = labels != 0
        if not bool((labels < 0).any()) and not bool(known.all()):
            raise DataError(
                "the label matrix holds integers without any -1, so 0 would mean 'not annotated' and no class would "
                "have a negative: give floats or booleans where 0 means absent, or class numbers"
            )
        known = None if bool(known.all()) else known
    if multilabel is None:
        multilabel = known is not None or bool((positive.sum(dim=1) != 1).any())
    if multilabel:
        return Labels(labels.shape[1], positive=positive, known=known)
    return Labels(labels.shape[1], numbers=labels.to(torch.float32).argmax(dim=1))


def _from_numbers(numbers: Tensor, multilabel: bool) -> Labels:
    if numbers.is_floating_point() or int(numbers.min()) < 0:
        raise DataError("a vector of labels holds class numbers: give integers from 0")
    numbers = numbers.long()
    classes = int(numbers.max()) + 1
    if multilabel:
        return Labels(classes, positive=torch.nn.functional.one_hot(numbers, classes).bool())
    return Labels(classes, numbers=numbers)


def held_out_split(labels: Labels, share: float, seed: int) -> tuple[Int64[Tensor, "fitted"], Int64[Tensor, "held"]]:
    """Rows to fit on, and rows to choose settings on: a share of all images, or of every class for single-label
    images."""
    count = round(share * len(labels))
    order = torch.randperm(len(labels), generator=generator(seed, "probe split"))
    if labels.numbers is not None:
        numbers = labels.numbers.cpu()[order]
        place = _place_within_class(numbers)
        sizes = torch.bincount(numbers, minlength=labels.classes)
        held = place < (share * sizes.double()).round()[numbers]
        order, count = torch.cat([order[held], order[~held]]), int(held.sum())
    if not 0 < count < len(labels):
        raise DataError(
            f"a share of {share:g} of {len(labels)} training images leaves none to choose settings on, or none to fit: "
            "give the probe more images of each class, another share, or a validation set"
        )
    return order[count:], order[:count]


def few_shot(
    labels: Shaped[Tensor, "images ..."], k: int, draw: int = 0, seed: int = 0, multilabel: bool | None = None
) -> Int64[Tensor, "rows"]:
    """Sorted rows of few-shot draw number `draw`: k images of each class; for multi-label images the union of k
    positives of each class (Goyal et al. 2019, https://arxiv.org/abs/1905.01235). The rows of a smaller k are among
    those of a larger one.

    >>> labels = torch.tensor([0, 1, 0, 1, 1, 0])
    >>> labels[few_shot(labels, k=2)].bincount()
    tensor([2, 2])
    """
    read = read_labels(labels, multilabel)
    order = torch.randperm(len(read), generator=generator(seed, "few-shot", draw))
    if read.numbers is not None:
        numbers = read.numbers.cpu()[order]
        counts = torch.bincount(numbers, minlength=read.classes)
        chosen = _place_within_class(numbers) < k
    else:
        positive = read.matrix.cpu()[order]
        counts = positive.sum(dim=0)
        chosen = (positive & (positive.cumsum(dim=0) <= k)).any(dim=1)
    if k < 1 or int(counts.min()) < k:
        scarce = int(counts.argmin())
        raise DataError(f"{k} images of each class cannot be drawn, class {scarce} has {int(counts[scarce])}: lower k")
    return order[chosen].sort().values


def share_of(labels: Shaped[Tensor, "images ..."], share: float, draw: int = 0, seed: int = 0) -> Int64[Tensor, "rows"]:
    """Sorted rows of a share of the images, at least one: of each class where every image has one label. The rows of a
    smaller share are among those of a larger one.

    >>> labels = torch.tensor([0, 1, 0, 1, 1, 0, 1, 1])
    >>> labels[share_of(labels, 0.34)].bincount()
    tensor([1, 2])
    """
    order = torch.randperm(len(labels), generator=generator(seed, "share of labels", draw))
    if labels.ndim == 2:
        return order[: max(1, round(share * len(labels)))].sort().values
    drawn = labels.cpu()[order]
    most = (share * torch.bincount(drawn)).round().clamp(min=1)
    return order[_place_within_class(drawn) < most[drawn]].sort().values


def _place_within_class(numbers: Int64[Tensor, "images"]) -> Int64[Tensor, "images"]:
    """How many images of the same class come before each image.

    >>> _place_within_class(torch.tensor([1, 0, 1, 1]))
    tensor([0, 0, 1, 2])
    """
    by_class = numbers.argsort(stable=True)
    counts = numbers.bincount()
    starts = counts.cumsum(dim=0) - counts
    place = torch.empty_like(numbers)
    place[by_class] = torch.arange(len(numbers)) - starts[numbers[by_class]]
    return place
