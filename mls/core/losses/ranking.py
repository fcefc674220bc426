"""The pairwise ranking loss: every positive of a sample should score above every negative of it."""

import torch
from torch import Tensor

from mls.core.losses import Index, Labels, Loss, Matrix, register


@register("pairwise_rank")
class PairwiseRank(Loss):
    """Pairwise ranking of probabilities, the PR row of Cole et al. (https://arxiv.org/abs/2106.09708).

        sum_{p in P} sum_{n in N} max(0, 1 - f_p + f_n)        f = sigmoid(x), x [batch, classes]

    P are a sample's positives, N its 0 and -1. Probabilities differ by less than 1, so the margin is never met and the
    maximum never acts; hence the double sum is |N| sum_P (1 - f_p) + |P| sum_N f_n, which is what is computed.

    "mean" divides the sum over samples by batch * classes; "none" gives [batch].

    >>> PairwiseRank()(torch.zeros(1, 4), labels=torch.tensor([[1, 1, 0, -1]])).item()  # four pairs / 4
    1.0
    """

    elementwise = False

    def forward(self, logits: Matrix, labels: Labels, pseudo: Matrix | None = None, index: Index = None) -> Tensor:
        logits, positive = self.scaled(logits), labels > 0
        short = torch.sigmoid(-logits).masked_fill(~positive, 0.0).sum(dim=1)  # of 1, over the positives: [batch]
        over = torch.sigmoid(logits).masked_fill(positive, 0.0).sum(dim=1)  # 0, over the negatives
        loss = (~positive).sum(dim=1) * short + positive.sum(dim=1) * over  # [batch]
        if self.reduction == "none":
            return loss
        return loss.sum() / logits.numel() if self.reduction == "mean" else loss.sum()
