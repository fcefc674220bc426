"""Metrics of scored classes, as shares (0 to 1). Average precision is the area under the precision-recall steps, ties
counted as one threshold: scikit-learn's definition, for all classes at once. Variants of protocols are in eval/."""

import torch
from jaxtyping import Float, Num
from torch import Tensor

from mls.errors import DataError


@torch.no_grad()
def average_precision(scores: Float[Tensor, "items *classes"], targets: Num[Tensor, "items *classes"]) -> Tensor:
    """Of one class, or of each column; float64. Targets above 0 are positive. A class without positives has 0.

    >>> average_precision(torch.tensor([0.9, 0.8, 0.1]), torch.tensor([1, 0, 1])).item()
    0.8333333333333333
    """
    if scores.shape != targets.shape:
        raise ValueError(
            f"scores have shape {tuple(scores.shape)}, targets {tuple(targets.shape)}: both must be the same"
        )
    if scores.isnan().any():
        raise DataError(
            "scores hold NaN, so they have no order: look for the non-finite features or weights behind them"
        )
    ordered, order = scores.double().sort(dim=0, descending=True)
    positive = (targets > 0).double().gather(0, order)
    rank = torch.arange(1, len(scores) + 1, device=scores.device).view(-1, *[1] * (scores.ndim - 1)).expand_as(order)
    # A positive counts with the precision at the end of its tie: there the threshold lets all of the tie in.
    ends = torch.ones_like(order, dtype=torch.bool)
    ends[:-1] = ordered[:-1] != ordered[1:]
    end = rank.where(ends, len(scores)).flip(0).cummin(dim=0).values.flip(0)  # [items, *classes]
    precision = positive.cumsum(dim=0).gather(0, end - 1) / end
    return (positive * precision).sum(dim=0) / positive.sum(dim=0).clamp(min=1)


def mean_average_precision(
    scores: Float[Tensor, "items classes"], targets: Num[Tensor, "items classes"], skip_empty: bool = True
) -> float:
    """The mean over classes; those without positives are left out, or count 0. NaN where no class has a positive.

    >>> mean_average_precision(torch.tensor([[0.9, 0.2], [0.4, 0.1]]), torch.tensor([[1, 0], [0, 0]]))
    1.0
    """
    per_class = average_precision(scores, targets)
    counted = (targets > 0).any(dim=0) if skip_empty else torch.ones_like(per_class, dtype=torch.bool)
    return per_class[counted].mean().item()


@torch.no_grad()
def top1(scores: Float[Tensor, "items classes"], targets: Num[Tensor, "items *classes"]) -> float:
    """The share of items whose best-scored class is right; targets are class numbers or one-hot rows.

    >>> top1(torch.tensor([[0.9, 0.2], [0.4, 0.1]]), torch.tensor([0, 1]))
    0.5
    """
    truth = targets if targets.ndim == 1 else targets.argmax(dim=1)
    return (scores.argmax(dim=1) == truth).double().mean().item()
