"""The assumed-negative family: binary cross-entropy in which every label that is not positive counts as negative, and
its positive half alone."""

import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor

from mls.losses import Loss, register


@register("an", aliases=("bce",))
class AssumedNegative(Loss):
    """The loss of MLS (https://arxiv.org/abs/2308.03286, Eq. 9), and "assume negative" of Cole et al.
    (https://arxiv.org/abs/2106.09708).

        -log sigmoid(x) for a positive, -log(1 - sigmoid(x)) for 0 and -1        x [batch, classes]

    "mean" is over batch and classes, as in the papers.

    >>> import torch
    >>> logits = torch.tensor([[2.0, -1.0, 0.0]], requires_grad=True)
    >>> AssumedNegative()(logits, labels=torch.tensor([[1, 0, -1]])).backward()
    >>> logits.grad  # (sigmoid(x) - y) / 3
    tensor([[-0.0397,  0.0896,  0.1667]])
    """

    def entries(
        self, logits: Float[Tensor, "batch classes"], labels: Num[Tensor, "batch classes"], *_: object
    ) -> Float[Tensor, "batch classes"]:
        return F.binary_cross_entropy_with_logits(logits, (labels > 0).to(logits.dtype), reduction="none")


@register("bce_pos")
class PositiveOnly(Loss):
    """BCE-pos, Eq. 15 of the MLS supplement (https://arxiv.org/abs/2308.03286).

        -y log sigmoid(x)        x [batch, classes], y = 1 for a positive, else 0

    "mean" is over batch and classes, negatives in the count: with few positives the value is small.

    >>> import torch
    >>> PositiveOnly()(torch.zeros(1, 4), labels=torch.tensor([[1, 0, 0, -1]])).item()  # log(2) / 4
    0.1732867956161499
    """

    def entries(
        self, logits: Float[Tensor, "batch classes"], labels: Num[Tensor, "batch classes"], *_: object
    ) -> Float[Tensor, "batch classes"]:
        return -F.logsigmoid(logits).masked_fill(labels <= 0, 0.0)
