"""The metrics of semantic segmentation, mIoU, mAcc and aAcc, from a confusion matrix."""

from __future__ import annotations

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from mls.data.pictures import VOID


def confusion(
    found: Int64[Tensor, "height width"], truth: UInt8[Tensor, "height width"], classes: int
) -> Int64[Tensor, "classes classes"]:
    """The number of pixels by true class (rows) and predicted class; void pixels are left out.

    >>> confusion(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 0, 255]], dtype=torch.uint8), 2)
    tensor([[1, 1],
            [0, 0]])
    """
    known = truth != VOID
    pairs = classes * truth[known].long() + found[known]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def segmentation_metrics(counts: Int64[Tensor, "classes found"]) -> dict[str, float]:
    """As shares. miou, macc: means over the classes that occur (mIoU: in the labels or the predictions); aacc: over
    all pixels. Columns behind those of the classes are pixels in which no class was found.

    >>> segmentation_metrics(torch.tensor([[1, 1], [0, 2]]))
    {'miou': 0.5833333333333333, 'macc': 0.75, 'aacc': 0.75}
    """
    counts = counts.double()
    right, true, found = counts.diagonal(), counts.sum(1), counts.sum(0)[: len(counts)]
    return {
        "miou": (right / (true + found - right)).nanmean().item(),
        "macc": (right / true).nanmean().item(),
        "aacc": (right.sum() / counts.sum()).item(),
    }
