"""The generalised robust loss: how far an unknown label counts as positive, and how much it counts, follow from its
score."""

import torch
import torch.nn.functional as F

from mls.core.losses import Labels, Loss, Matrix, register, require
from mls.core.losses.assumed_negative import of_known

BETA = [0.0, 2.0, -2.0, -2.0]  # slope and offset of the soft target: slope at the start and end, offset the same
ALPHA = [0.5, 2.0, 0.8, 0.5]  # mean and deviation of the weight at the start, then at the end


@register("gr")
class GeneralisedRobust(Loss):
    """GR loss, "Boosting Single Positive Multi-label Classification with Generalized Robust Loss"
    (https://arxiv.org/abs/2405.03501), as its released code (yan4xi1/GRLoss) has it. For an unknown label:

        v (k (1 - f^q2) / q2 + (1 - k) (1 - (1 - f)^q3) / q3)        f = sigmoid(x), x [batch, classes]
        k = sigmoid(w f + b), its chance to be positive        v = exp(-(f - m)^2 / (2 s^2)), its weight

    and -log f for a positive; k and v carry no gradient. The paper has no known negatives, here -log(1 - f). In epoch t
    of T, w and b have gone (t - 1) / T of their way, m and s t / T. "mean" is over batch and classes.

    q_pos, q_neg  q2 and q3. (1 - p^q) / q is -log p at q -> 0, cross-entropy, and 1 - p at q = 1, the absolute loss.
    beta    [w, w at the end, b, b at the end]; None: [0, 2, -2, -2], the released code's
    alpha   [m, s, m at the end, s at the end]; None: [0.5, 2, 0.8, 0.5], the released code's
    epochs  T; later epochs are as the last. The code trains for 8.

    >>> loss = GeneralisedRobust(reduction="none")(torch.zeros(1, 3), torch.tensor([[1, 0, -1]]))
    >>> [round(value, 4) for value in loss[0].tolist()]
    [0.6931, 0.5227, 0.6931]
    """

    separable = True

    def __init__(
        self,
        q_pos: float = 0.01,
        q_neg: float = 1.0,
        beta: list[float] | None = None,
        alpha: list[float] | None = None,
        epochs: int = 10,
        temperature: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__(temperature, reduction)
        require(q_pos > 0 and q_neg > 0, "q_pos or q_neg", min(q_pos, q_neg), "numbers above 0")
        require(epochs > 0, "epochs", epochs, "a number above 0")
        for name, values in (("beta", beta), ("alpha", alpha)):
            require(values is None or len(values) == 4, name, values, "four numbers, or null")
        require(alpha is None or min(alpha[1], alpha[3]) > 0, "alpha", alpha, "deviations above 0")
        self.q_pos, self.q_neg, self.beta, self.alpha, self.epochs, self.epoch = q_pos, q_neg, beta, alpha, epochs, 1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def entries(self, logits: Matrix, labels: Labels, *_: object) -> Matrix:
        chance, weight = self.of_scores(torch.sigmoid(logits.detach()))
        robust = lambda logits, q: -torch.expm1(q * F.logsigmoid(logits)) / q
        unknown = weight * (chance * robust(logits, self.q_pos) + (1 - chance) * robust(-logits, self.q_neg))
        return torch.where(labels == 0, unknown, of_known(logits, labels))

    def of_scores(self, scores: Matrix) -> tuple[Matrix, Matrix]:
        """k and v of this epoch."""
        (w, w_end, b, b_end), (m, s, m_end, s_end) = self.beta or BETA, self.alpha or ALPHA
        before, now = ((min(at, self.epochs)) / self.epochs for at in (self.epoch - 1, self.epoch))
        slope, offset = w + (w_end - w) * before, b + (b_end - b) * before
        middle, width = m + (m_end - m) * now, s + (s_end - s) * now
        return torch.sigmoid(slope * scores + offset), torch.exp(-((scores - middle) / width).square() / 2)
