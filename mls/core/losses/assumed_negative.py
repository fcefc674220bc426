"""The assumed-negative family: binary cross-entropy in which every label that is not positive counts as negative, with
its variants that weigh, smooth or leave out the negatives."""

import torch
import torch.nn.functional as F

from mls.core.losses import Labels, Loss, Matrix, register, require


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

    separable = True

    def entries(self, logits: Matrix, labels: Labels, *_: object) -> Matrix:
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

    separable = True

    def entries(self, logits: Matrix, labels: Labels, *_: object) -> Matrix:
        return -F.logsigmoid(logits).masked_fill(labels <= 0, 0.0)


def of_known(logits: Matrix, labels: Labels) -> Matrix:
    """Binary cross-entropy where the label is known, 0 where it is not."""
    entries = F.binary_cross_entropy_with_logits(logits, (labels > 0).to(logits.dtype), reduction="none")
    return entries.masked_fill(labels == 0, 0.0)


@register("iu")
class IgnoreUnknown(Loss):
    """ "Ignore unobserved" of Cole et al. (https://arxiv.org/abs/2106.09708): learn from known labels alone.

        -log sigmoid(x) for a positive, -log(1 - sigmoid(x)) for -1, 0 for 0        x [batch, classes]

    "mean" is over batch and classes, unknown labels in the count. Without known negatives nothing pulls a score down.

    >>> IgnoreUnknown()(torch.zeros(1, 4), labels=torch.tensor([[1, 0, 0, -1]])).item()  # 2 log(2) / 4
    0.3465735912322998
    """

    separable = True

    def entries(self, logits: Matrix, labels: Labels, *_: object) -> Matrix:
        return of_known(logits, labels)


@register("dw")
class DownWeighted(AssumedNegative):
    """Down-weighted negatives, the DW row of "Acknowledging the Unknown" (https://arxiv.org/abs/2203.16219).

        -log sigmoid(x) for a positive, -alpha log(1 - sigmoid(x)) for 0 and -1        x [batch, classes]

    alpha  weight of a negative. None: 1 / (classes - 1), which is `wan`. The paper's table does not say its weight, and
           its numbers differ from those published for WAN.

    >>> loss = DownWeighted(alpha=0.5)(torch.zeros(1, 4), labels=torch.tensor([[1, 0, 0, -1]]))
    >>> round(loss.item(), 4)  # 2.5 log(2) / 4
    0.4332
    """

    separable = False  # a negative's weight is a matter of how many classes there are

    def __init__(self, alpha: int | float | None = None, temperature: float = 1.0, reduction: str = "mean") -> None:
        super().__init__(temperature, reduction)
        if alpha is not None:
            require(isinstance(alpha, (int, float)) and alpha >= 0, "alpha", alpha, "a number from 0 up, or null")
        self.alpha = alpha

    def entries(self, logits: Matrix, labels: Labels, *_: object) -> Matrix:
        weight = 1 / max(logits.shape[1] - 1, 1) if self.alpha is None else self.alpha
        entries = super().entries(logits, labels)
        return torch.where(labels > 0, entries, weight * entries)


@register("wan")
class WeakAssumedNegative(DownWeighted):
    """Weak assume negative of Cole et al. (https://arxiv.org/abs/2106.09708): with one positive a sample, positives and
    negatives weigh the same.

        -log sigmoid(x) for a positive, -log(1 - sigmoid(x)) / (classes - 1) for 0 and -1        x [batch, classes]

    >>> WeakAssumedNegative()(torch.zeros(1, 4), labels=torch.tensor([[1, 0, 0, -1]])).item()  # 2 log(2) / 4
    0.3465735912322998
    """

    def __init__(self, temperature: float = 1.0, reduction: str = "mean") -> None:
        super().__init__(None, temperature, reduction)


@register("an_ls")
class SmoothedAssumedNegative(Loss):
    """Assume negative with label smoothing, AN-LS of Cole et al. (https://arxiv.org/abs/2106.09708).

        -t log sigmoid(x) - (1 - t) log(1 - sigmoid(x)),  t = 1 - epsilon for a positive, epsilon for 0 and -1
                                                                                        x [batch, classes]

    The published code smooths by epsilon on both sides, not by epsilon / 2.

    >>> round(SmoothedAssumedNegative()(torch.tensor([[2.0, -2.0]]), labels=torch.tensor([[1, 0]])).item(), 4)
    0.3269
    """

    separable = True

    def __init__(self, epsilon: float = 0.1, temperature: float = 1.0, reduction: str = "mean") -> None:
        super().__init__(temperature, reduction)
        require(0 <= epsilon <= 1, "epsilon", epsilon, "a number from 0 to 1")
        self.epsilon = epsilon

    def target(self, logits: Matrix, labels: Labels) -> Matrix:
        return torch.full_like(logits, self.epsilon).masked_fill(labels > 0, 1 - self.epsilon)

    def entries(self, logits: Matrix, labels: Labels, *_: object) -> Matrix:
        return F.binary_cross_entropy_with_logits(logits, self.target(logits, labels), reduction="none")


@register("n_ls")
class SmoothedUnknown(SmoothedAssumedNegative):
    """Label smoothing of the assumed negatives alone, the N-LS row of "Acknowledging the Unknown"
    (https://arxiv.org/abs/2203.16219).

        -t log sigmoid(x) - (1 - t) log(1 - sigmoid(x)),  t = 1 for a positive, epsilon for 0, 0 for -1
                                                                                        x [batch, classes]

    >>> round(SmoothedUnknown()(torch.tensor([[2.0, -2.0]]), labels=torch.tensor([[1, 0]])).item(), 4)
    0.2269
    """

    def target(self, logits: Matrix, labels: Labels) -> Matrix:
        return (labels > 0).to(logits.dtype).masked_fill(labels == 0, self.epsilon)
