"""The convex losses that solve.py minimises: softmax, and per class a logistic loss or a squared hinge. solve.py adds
the penalties."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from torch import Tensor

Rows: TypeAlias = Int64[Tensor, "some"] | slice


@dataclass
class Softmax:
    """Cross-entropy of class numbers: one group with all classes; sgd.py has a group for each of its settings."""

    numbers: Int64[Tensor, "images"]
    share: Float[Tensor, "classes"]  # of each class among the fitted images
    groups: int = 1
    free_bias = True

    def start(self) -> tuple[Tensor, Tensor]:
        shape = self.groups, len(self.share)
        return self.share.log().expand(shape), (self.share * (1 - self.share)).expand(shape)

    def losses(self, logits: Float[Tensor, "groups classes some"], rows: Rows) -> tuple[Tensor, Tensor]:
        own = self.numbers[rows].expand(len(logits), 1, -1)
        logits = logits.sub_(logits.amax(dim=1, keepdim=True))
        right = logits.gather(1, own)
        slopes = logits.exp_()
        total = slopes.sum(dim=1, keepdim=True)
        loss = (total.log() - right).sum(dim=(1, 2), dtype=torch.float64)
        return loss, slopes.div_(total).scatter_add_(1, own, torch.full_like(total, -1.0))

    def select(self, groups: Bool[Tensor, "groups"]) -> Softmax:
        return replace(self, groups=int(groups.sum()))


@dataclass
class Logistic:
    """Binary cross-entropy. A group is one class; its mean is over the images in which it is annotated."""

    positive: Bool[Tensor, "classes images"]
    known: Bool[Tensor, "classes images"] | None
    share: Float[Tensor, "groups"]  # of positives
    weight: Float[Tensor, "groups"]  # of an annotated image: makes the mean over all images that over annotated ones
    row: Int64[Tensor, "groups"]  # of the class
    free_bias = True

    def start(self) -> tuple[Tensor, Tensor]:
        return self.share.logit()[:, None], (self.share * (1 - self.share))[:, None]

    def losses(self, logits: Float[Tensor, "groups 1 some"], rows: Rows) -> tuple[Float64[Tensor, "groups"], Tensor]:
        logits = logits[:, 0]
        targets = self.positive[:, rows].to(logits.dtype)[self.row]
        entries = F.softplus(logits).addcmul_(logits, targets, value=-1)
        slopes = logits.sigmoid_().sub_(targets)
        if self.known is not None:
            weights = self.known[:, rows].to(logits.dtype)[self.row] * self.weight[:, None]
            entries, slopes = entries * weights, slopes * weights
        return entries.sum(dim=1, dtype=torch.float64), slopes[:, None]

    def select(self, groups: Bool[Tensor, "groups"]) -> Logistic:
        return replace(self, **{name: getattr(self, name)[groups] for name in ("share", "weight", "row")})


@dataclass
class SquaredHinge:
    """weight * max(0, 1 - sign * logit)^2 for signs of +1 and -1, 0 being left out. A group is one class
    without the images of one fold."""

    sign: Shaped[Tensor, "classes images"]
    fold_of: Shaped[Tensor, "classes images"]
    positive_weight: float
    row: Int64[Tensor, "groups"]  # of the class
    fold: Int64[Tensor, "groups"]  # that is left out; -2: none
    free_bias = False

    def start(self) -> tuple[Tensor, Tensor]:
        share = (self.sign > 0).double().mean(dim=1)[self.row]
        curvature = 2 * (1 + (self.positive_weight - 1) * share)
        return torch.zeros_like(curvature)[:, None], curvature[:, None]

    def losses(self, logits: Float[Tensor, "groups 1 some"], rows: Rows) -> tuple[Float64[Tensor, "groups"], Tensor]:
        logits = logits[:, 0]
        sign = self.sign[:, rows].to(logits.dtype)
        weights = torch.where(sign > 0, self.positive_weight, sign.abs())[self.row]
        weights = weights * (self.fold_of[:, rows][self.row] != self.fold[:, None])
        sign = sign[self.row]
        short = (1 - sign * logits).clamp_(min=0)
        slopes = weights * short
        return (slopes * short).sum(dim=1, dtype=torch.float64), slopes.mul_(sign).mul_(-2)[:, None]

    def select(self, groups: Bool[Tensor, "groups"]) -> SquaredHinge:
        return replace(self, **{name: getattr(self, name)[groups] for name in ("row", "fold")})
