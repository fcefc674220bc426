"""Pseudo-labels from class scores that another model gives, such as the similarity of images and class names."""

import torch
from jaxtyping import Float, Num
from torch import Tensor

from mls.core.losses import register, require
from mls.core.losses.entropy import PseudoLabelled


@register("vlpl")
class ScoredPseudoLabels(PseudoLabelled):
    """VLPL, "Vision-Language Pseudo-Labels for Single-Positive Multi-Label Learning"
    (https://arxiv.org/abs/2310.15985), as its released code (mvrl/VLPL) has it. An unknown label whose score is above
    `threshold` is a positive with a smoothed label s = 1 - smoothing, in place of its entropy:

        beta (-s log f - (1 - s) log(1 - f))        f = sigmoid(x), x and s [batch, classes]

    and `em` elsewhere. The scores come from `training.prior_scores=FILE`, images x classes. VLPL's are the softmax over
    the classes of CLIP's cosines of image and class name / 0.01; no such model is part of this.

    alpha   0.2 VOC, 0.1 COCO, 0.1 NUS-WIDE, 0.01 CUB in the released code; beta is 0.7 for all.

    >>> loss = ScoredPseudoLabels(reduction="none")
    >>> labels = torch.tensor([[1, 0, 0]])
    >>> pseudo = loss.labelled_by(torch.tensor([[0.1, 0.6, 0.3]]), labels)
    >>> loss(torch.zeros(1, 3), labels, pseudo) / torch.tensor(2.0).log()  # 1, beta, -alpha
    tensor([[ 1.0000,  0.7000, -0.1000]])
    """

    relabels = "never"
    takes_scores = True
    only_supervised = True

    def __init__(
        self,
        threshold: float = 0.3,
        smoothing: float = 0.1,
        alpha: float = 0.1,
        beta: float = 0.7,
        temperature: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__(alpha, beta, temperature, reduction)
        require(0 <= smoothing < 1, "smoothing", smoothing, "a number from 0 to 1, without 1")
        self.threshold, self.smoothing = threshold, smoothing

    def labelled_by(
        self, scores: Float[Tensor, "samples classes"], labels: Num[Tensor, "samples classes"]
    ) -> Float[Tensor, "samples classes"]:
        found = (labels == 0) & (scores > self.threshold)
        return torch.full(labels.shape, torch.nan).masked_fill(found, 1 - self.smoothing)
