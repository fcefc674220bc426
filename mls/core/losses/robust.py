"""Losses that tolerate wrong labels as such, whatever made them wrong."""

import torch

from mls.core.losses import Labels, Matrix, register, require
from mls.core.losses.assumed_negative import AssumedNegative

LOG_OF_ZERO = -4.0  # the paper's A


@register("symmetric_ce")
class SymmetricCrossEntropy(AssumedNegative):
    """Symmetric cross-entropy, SL (https://arxiv.org/abs/1908.06112), in its binary form: the cross-entropy, and the
    same with prediction and label exchanged, where log 0 is taken as -4.

        alpha an(x, y) + beta (4 (1 - f) for a positive, 4 f for 0 and -1)        f = sigmoid(x), x [batch, classes]

    The reverse term is bounded, so a wrong label cannot pull without end. "mean" is over batch and classes.

    >>> round(SymmetricCrossEntropy()(torch.zeros(1, 2), labels=torch.tensor([[1, 0]])).item(), 4)  # 0.1 log(2) + 2
    2.0693
    """

    def __init__(
        self, alpha: float = 0.1, beta: float = 1.0, temperature: float = 1.0, reduction: str = "mean"
    ) -> None:
        super().__init__(temperature, reduction)
        require(alpha >= 0, "alpha", alpha, "a number from 0 up")
        require(beta >= 0, "beta", beta, "a number from 0 up")
        self.alpha, self.beta = alpha, beta

    def entries(self, logits: Matrix, labels: Labels, *_: object) -> Matrix:
        reverse = -LOG_OF_ZERO * torch.sigmoid(torch.where(labels > 0, -logits, logits))
        return self.alpha * super().entries(logits, labels) + self.beta * reverse
