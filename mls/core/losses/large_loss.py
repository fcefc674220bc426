"""Large-loss rejection and correction: among the unknown labels, assumed negative, those with the largest loss are
likely positives."""

import math
from fractions import Fraction

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

from mls.core.losses import register, require
from mls.core.losses.assumed_negative import AssumedNegative


class LargeLoss(AssumedNegative):
    """What the three schemes share: which entries they modify. Each epoch's share grows by `delta_rel`."""

    separable = False  # which losses are large is a matter of all of them

    def __init__(self, delta_rel: float, temperature: float, reduction: str) -> None:
        super().__init__(temperature, reduction)
        require(delta_rel >= 0, "delta_rel", delta_rel, "a percentage from 0 up")
        self.delta_rel = delta_rel
        self.epoch = 1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def rounds(self) -> int:
        """How many times delta_rel is modified in this epoch."""
        return self.epoch - 1

    def count(self, entries: int) -> int:
        """The percentage is of all entries. In fractions: 16 * 20 * 5 * 0.5 / 100 is 8, floating point makes it 9."""
        return math.ceil(Fraction(str(self.delta_rel)) * entries * self.rounds() / 100)

    @torch.no_grad()
    def large(
        self, logits: Float[Tensor, "batch classes"], labels: Num[Tensor, "batch classes"]
    ) -> Bool[Tensor, "batch classes"]:
        """The unknown labels with the largest losses, ties included."""
        unknown = labels == 0
        count = min(self.count(logits.numel()), logits.numel())
        if count == 0:
            return torch.zeros_like(unknown)
        # A negative's loss grows with its logit, and equal logits tie exactly where their losses may round apart.
        candidates = logits.masked_fill(~unknown, -torch.inf)
        return unknown & (candidates >= candidates.flatten().topk(count).values[-1])


@register("ll_r")
class LargeLossRejection(LargeLoss):
    """LL-R of "Large Loss Matters" (https://arxiv.org/abs/2206.03740): the largest losses of unknown labels are left
    out.

        -log sigmoid(x) for a positive, -log(1 - sigmoid(x)) for -1 and 0, but 0 for the k largest losses among the
        unknown labels, k = ceil(batch * classes * (epoch - 1) * delta_rel / 100)        x [batch, classes]

    Ties with the k-th are left out too. "mean" is over batch and classes, those left out in the count. Epoch 1 is
    `an`.

    delta_rel  per cent of all labels of the batch that are added with each epoch.

    >>> loss = LargeLossRejection(delta_rel=50.0)
    >>> loss.set_epoch(2)  # two of four labels
    >>> logits, labels = torch.tensor([[0.0, 9.0, -1.0, 2.0]]), torch.tensor([[1, 0, 0, 0]])
    >>> round(loss(logits, labels).item(), 4)  # (log 2 + log(1 + 1/e)) / 4
    0.2516
    """

    def __init__(self, delta_rel: float = 0.5, temperature: float = 1.0, reduction: str = "mean") -> None:
        super().__init__(delta_rel, temperature, reduction)

    def entries(
        self, logits: Float[Tensor, "batch classes"], labels: Num[Tensor, "batch classes"], *_: object
    ) -> Float[Tensor, "batch classes"]:
        return super().entries(logits, labels).masked_fill(self.large(logits, labels), 0.0)


@register("ll_ct")
class TemporaryCorrection(LargeLoss):
    """LL-Ct of "Large Loss Matters" (https://arxiv.org/abs/2206.03740): as `ll_r`, but labels with the largest losses
    count as positives in this step.

        -log sigmoid(x) for a positive and for the k largest losses among the unknown labels,
        -log(1 - sigmoid(x)) for -1 and the other 0        x [batch, classes], k as in `ll_r`

    delta_rel  per cent of all labels of the batch that are added with each epoch.

    >>> loss = TemporaryCorrection(delta_rel=50.0)
    >>> loss.set_epoch(2)
    >>> logits, labels = torch.tensor([[0.0, 9.0, -1.0, 2.0]]), torch.tensor([[1, 0, 0, 0]])
    >>> round(loss(logits, labels).item(), 4)
    0.2834
    """

    def __init__(self, delta_rel: float = 0.2, temperature: float = 1.0, reduction: str = "mean") -> None:
        super().__init__(delta_rel, temperature, reduction)

    def entries(
        self, logits: Float[Tensor, "batch classes"], labels: Num[Tensor, "batch classes"], *_: object
    ) -> Float[Tensor, "batch classes"]:
        return super().entries(logits, labels.masked_fill(self.large(logits, labels), 1))


@register("ll_cp")
class PermanentCorrection(LargeLoss):
    """LL-Cp of "Large Loss Matters" (https://arxiv.org/abs/2206.03740): as `ll_ct`, but what is corrected stays so, and
    each epoch corrects the same share anew.

        as `ll_ct`, with k = ceil(batch * classes * delta_rel / 100) from epoch 2 on        x [batch, classes]

    `relabel` makes what a step corrected +1 for good; in pretraining, whose labels are new at each step, the correction
    is temporary.

    delta_rel  per cent of all labels of the batch that are corrected.

    >>> loss = PermanentCorrection(delta_rel=50.0)
    >>> loss.set_epoch(7)
    >>> logits, labels = torch.tensor([[0.0, 9.0, -1.0, 2.0]]), torch.tensor([[1, 0, 0, 0]])
    >>> round(loss(logits, labels).item(), 4)
    0.2834
    >>> loss.relabel(labels, None, logits)[0]
    tensor([[1, 1, 0, 1]])
    """

    relabels = "step"

    def __init__(self, delta_rel: float = 0.1, temperature: float = 1.0, reduction: str = "mean") -> None:
        super().__init__(delta_rel, temperature, reduction)

    def rounds(self) -> int:
        return min(self.epoch - 1, 1)

    def entries(
        self, logits: Float[Tensor, "batch classes"], labels: Num[Tensor, "batch classes"], *_: object
    ) -> Float[Tensor, "batch classes"]:
        return super().entries(logits, labels.masked_fill(self.large(logits, labels), 1))

    def relabel(
        self, labels: Tensor, pseudo: Tensor | None, outputs: Tensor, share: float = 0.0, rounds: int = 1
    ) -> tuple[Tensor, Tensor | None]:
        return labels.masked_fill(self.large(self.scaled(outputs), labels), 1), pseudo
