"""Curriculum labelling: the network predicts the missing labels that it is sure of, and goes on with these."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mls.core.losses import Index, Labels, Loss, Matrix, register, require


@register("curriculum")
class CurriculumLabels(Loss):
    """Partial-BCE with a curriculum by score, "Learning a Deep ConvNet for Multi-label Classification with Partial
    Labels" (https://arxiv.org/abs/1902.09720), the Curriculum row of "Large Loss Matters". For each sample:

        (alpha p^gamma + beta) / classes * sum over known labels of (-log f of positives, -log(1 - f) of negatives)

    f = sigmoid(x), x [batch, classes], p the share of its labels that are known; the mean over samples. `relabel` makes
    every unknown label whose |x| is at least theta known, positive where x > 0, anew in each round (the paper's score
    threshold). Its graph network and its other strategies are not here. Without known negatives all predictions turn
    positive: it is for data that have both.

    alpha, beta, gamma  such that the weight is 1 for all labels and 5 for a tenth of them. These and theta were not
                        compared with the paper's text or code.

    >>> loss = CurriculumLabels()
    >>> labels = torch.tensor([[1, 0, 0, -1]])
    >>> round(loss(torch.zeros(1, 4), labels).item(), 4)  # (5.45 - 4.45 / 2) / 4 * 2 log(2)
    1.1177
    >>> loss.relabel(labels, None, torch.tensor([[0.5, 0.9, 0.5, 0.5]]))[1]
    tensor([[nan, 1., nan, nan]])
    """

    elementwise = False
    relabels = "epoch"
    only_supervised = True

    def __init__(
        self,
        theta: float = 2.0,
        alpha: float = -4.45,
        beta: float = 5.45,
        gamma: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(temperature)
        require(theta > 0, "theta", theta, "a number above 0")
        self.theta, self.alpha, self.beta, self.gamma = theta, alpha, beta, gamma

    def forward(self, logits: Matrix, labels: Labels, pseudo: Matrix | None = None, index: Index = None) -> Tensor:
        logits = self.scaled(logits)
        known, target = labels != 0, (labels > 0).to(logits.dtype)
        if pseudo is not None:
            predicted = ~known & ~pseudo.isnan()
            known, target = known | predicted, torch.where(predicted, pseudo.to(logits.dtype), target)
        entries = F.binary_cross_entropy_with_logits(logits, target, reduction="none").masked_fill(~known, 0.0)
        weight = self.alpha * known.to(logits.dtype).mean(1) ** self.gamma + self.beta
        return (weight * entries.mean(1)).mean()

    @torch.no_grad()
    def relabel(
        self, labels: Tensor, pseudo: Tensor | None, outputs: Tensor, share: float = 0.0, rounds: int = 1
    ) -> tuple[Tensor, Tensor | None]:
        sure = (labels == 0) & (outputs.logit().abs() >= self.theta)
        return labels, (outputs > 0.5).to(outputs.dtype).masked_fill(~sure, torch.nan)
