"""The entropy family: an unknown label is neither positive nor negative, its prediction's entropy is what counts."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Num
from torch import Tensor

from mls.core.losses import Loss, register, require
from mls.core.losses.assumed_negative import of_known


def entropy(logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
    """-f log f - (1 - f) log(1 - f), f = sigmoid(logits)."""
    return -torch.sigmoid(logits) * F.logsigmoid(logits) - torch.sigmoid(-logits) * F.logsigmoid(-logits)


@register("ent_min")
class EntropyMinimisation(Loss):
    """Entropy minimisation, the EntMin row of "Acknowledging the Unknown" (https://arxiv.org/abs/2203.16219): each
    unknown label is pushed to the side that its prediction leans to.

        -log f for a positive, -log(1 - f) for -1, alpha H(f) for 0        f = sigmoid(x), x [batch, classes]

    H(f) = -f log f - (1 - f) log(1 - f). "mean" is over batch and classes.

    >>> EntropyMinimisation(alpha=0.5)(torch.zeros(1, 2), labels=torch.tensor([[1, 0]])).item()  # 1.5 log(2) / 2
    0.5198603868484497
    """

    separable = True

    def __init__(self, alpha: float = 0.1, temperature: float = 1.0, reduction: str = "mean") -> None:
        super().__init__(temperature, reduction)
        require(alpha >= 0, "alpha", alpha, "a number from 0 up")
        self.alpha = alpha

    def entries(
        self, logits: Float[Tensor, "batch classes"], labels: Num[Tensor, "batch classes"], *_: object
    ) -> Float[Tensor, "batch classes"]:
        return torch.where(labels == 0, self.alpha * entropy(logits), of_known(logits, labels))


@register("em")
class EntropyMaximisation(Loss):
    """Entropy maximisation, "Acknowledging the Unknown" (https://arxiv.org/abs/2203.16219): unknown labels are kept
    undecided, so that neither side's gradient takes over.

        -log f for a positive, -log(1 - f) for -1, -alpha H(f) for 0        f = sigmoid(x), x [batch, classes]

    H(f) = -f log f - (1 - f) log(1 - f). "mean" is over batch and classes. The value may be negative.

    alpha  0.2 VOC, 0.1 COCO, 0.1 NUS-WIDE, 0.01 CUB in the paper.

    >>> EntropyMaximisation(alpha=0.5)(torch.zeros(1, 2), labels=torch.tensor([[1, 0]])).item()  # 0.5 log(2) / 2
    0.1732867956161499
    """

    separable = True

    def __init__(self, alpha: float = 0.1, temperature: float = 1.0, reduction: str = "mean") -> None:
        super().__init__(temperature, reduction)
        require(alpha >= 0, "alpha", alpha, "a number from 0 up")
        self.alpha = alpha

    def entries(
        self,
        logits: Float[Tensor, "batch classes"],
        labels: Num[Tensor, "batch classes"],
        pseudo: Float[Tensor, "batch classes"] | None,
        index: Int64[Tensor, "batch"] | None,
    ) -> Float[Tensor, "batch classes"]:
        return torch.where(labels == 0, -self.alpha * entropy(logits), of_known(logits, labels))


@register("em_apl")
class PseudoLabelled(EntropyMaximisation):
    """Entropy maximisation with asymmetric pseudo-labels, "Acknowledging the Unknown"
    (https://arxiv.org/abs/2203.16219). Where an unknown label has a soft label s, in place of its entropy:

        beta (-s log f - (1 - s) log(1 - f))        f = sigmoid(x), x and s [batch, classes]

    and `em` elsewhere. `pseudo` holds s, and NaN where there is none; without `pseudo` this is `em`. `relabel` is the
    paper's asymmetric pseudo-labelling: in each round the lowest scores of each class become soft labels, for good.

    alpha, beta  0.2, 0.02 VOC; 0.1, 0.9 COCO; 0.1, 0.2 NUS-WIDE; 0.01, 0.4 CUB in the paper.

    >>> soft = torch.tensor([[torch.nan, 0.25, torch.nan]])
    >>> loss = PseudoLabelled(reduction="none")(torch.zeros(1, 3), torch.tensor([[1, 0, 0]]), pseudo=soft)
    >>> loss / torch.tensor(2.0).log()  # 1, beta, -alpha
    tensor([[ 1.0000,  0.9000, -0.1000]])
    """

    relabels = "epoch"

    def __init__(
        self, alpha: float = 0.1, beta: float = 0.9, temperature: float = 1.0, reduction: str = "mean"
    ) -> None:
        super().__init__(alpha, temperature, reduction)
        require(beta >= 0, "beta", beta, "a number from 0 up")
        self.beta = beta

    def entries(
        self,
        logits: Float[Tensor, "batch classes"],
        labels: Num[Tensor, "batch classes"],
        pseudo: Float[Tensor, "batch classes"] | None,
        index: Int64[Tensor, "batch"] | None,
    ) -> Float[Tensor, "batch classes"]:
        entries = super().entries(logits, labels, pseudo, index)
        if pseudo is None:
            return entries
        soft = pseudo.nan_to_num(0.0).to(logits.dtype)  # a NaN would reach the gradient through `where`
        softened = self.beta * F.binary_cross_entropy_with_logits(logits, soft, reduction="none")
        return torch.where((labels == 0) & ~pseudo.isnan(), softened, entries)

    @torch.no_grad()
    def relabel(
        self, labels: Tensor, pseudo: Tensor | None, outputs: Tensor, share: float = 0.0, rounds: int = 1
    ) -> tuple[Tensor, Tensor | None]:
        pseudo = torch.full(labels.shape, torch.nan) if pseudo is None else pseudo.clone()
        unannotated = labels == 0
        unknown = unannotated & pseudo.isnan()
        for column, count in enumerate((share * unannotated.sum(0) / rounds).int().tolist()):
            candidates = unknown[:, column].nonzero()[:, 0]
            lowest = outputs[candidates, column].argsort(stable=True)[:count]
            pseudo[candidates[lowest], column] = outputs[candidates[lowest], column]
        return labels, pseudo
