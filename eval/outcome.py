"""What a task gives: numbers on the test images, and how they came about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int8, Int64
from torch import Tensor

from mls.frozen.metrics import (
    average_precision,
    f1,
    frequency_groups,
    grouped,
    mean_average_precision,
    mean_average_precision_by_sample,
    top1_by_class,
    topk,
    voc_11_point,
)


@dataclass(frozen=True)
class Outcome:
    values: dict[str, float]  # metrics on the test images, as shares
    selection: str  # how what was tested had been chosen
    validation: float | None  # the protocol's metric where it was chosen
    seconds: float
    weights: dict[str, Tensor] = field(default_factory=dict)  # what was tested, to keep beside its numbers


def for_file(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached, contiguous and on the CPU, as safetensors stores them."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}


def metrics(
    scores: Float[Tensor, "images classes"],
    truth: Int8[Tensor, "images classes"] | Int64[Tensor, "images"],
    groups: int = 0,
    counts: Int64[Tensor, "classes"] | None = None,
) -> dict[str, float]:
    """Of probabilities, or of any scores where images have one label.

    One label an image: top1, top5; top1_class: mean over classes.

    Many, all on annotated entries only. map: mean over all classes, one without positives counts 0 (the SPML and LL
    papers). map_11pt: the same of VOC 2007's 11-point precision. map_class: classes without positives are left out
    (Two-way's mAP@class, OpenImages). map_sample: classes ranked within each image. f1: mean over classes at
    probability 0.5. map_g1 ...: groups of classes from rare to frequent.

    >>> scores, truth = torch.tensor([[0.9, 0.1], [0.2, 0.3]]), torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    >>> found = metrics(scores, truth)
    >>> found["map"], found["map_class"], found["map_sample"]
    (0.5, 1.0, 1.0)
    >>> metrics(scores, torch.tensor([0, 0]))["top1"]
    0.5
    """
    if truth.ndim == 1:
        values = {"top1": topk(scores, truth, 1), "top5": topk(scores, truth, 5)}
        return values | {"top1_class": top1_by_class(scores, truth)}
    known = truth != 0
    mask = None if bool(known.all()) else known
    per_class = average_precision(scores, truth, known=mask)
    values = {
        "map": mean_average_precision(scores, truth, skip_empty=False, known=mask),
        "map_11pt": voc_11_point(scores, truth, known=mask)[known.any(0)].mean().item(),
        "map_class": mean_average_precision(scores, truth, known=mask),
        "map_sample": mean_average_precision_by_sample(scores, truth, known=mask),
        "f1": f1(scores, truth, known=mask),
    }
    if groups:
        assert counts is not None
        met = (truth > 0).any(0)
        means = grouped(per_class.where(met, torch.nan), frequency_groups(counts, groups), groups)
        values |= {f"map_g{number}": mean for number, mean in enumerate(means, start=1)}
    return values
