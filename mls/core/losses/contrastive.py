"""Losses in which classes compete: InfoNCE (one positive, a function of embeddings), the multi-label softmax (several
positives, a loss on logits), and what it shares with the two-way loss."""

import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor

from mls.core.losses import Index, Labels, Loss, Matrix, at_least_fp32, register
from mls.core.products import Mask, log_sum_exp
from mls.errors import ConfigError, unknown_name


def info_nce(
    query: Float[Tensor, "batch dim"],
    key: Float[Tensor, "batch dim"],
    negatives: Float[Tensor, "negatives dim"],
    temperature: float,
    mask: Mask | None = None,
) -> Float[Tensor, ""]:
    """InfoNCE as in MoCo (https://arxiv.org/abs/1911.05722, Eq. 1); all vectors have unit length.

        -log( exp(q.k / t) / (exp(q.k / t) + sum_n exp(q.n / t)) ), the mean over the batch

    Where `mask` is True a negative is left out. Without negatives the loss is 0.

    >>> import torch
    >>> query, key = F.normalize(torch.randn(8, 16)), F.normalize(torch.randn(8, 16))
    >>> bool(info_nce(query, key, negatives=F.normalize(torch.randn(32, 16)), temperature=0.2) > 0)
    True
    """
    query, key = at_least_fp32(query), at_least_fp32(key)
    others = log_sum_exp(query, negatives, temperature, mask)  # [batch]
    return info_nce_of_logits((query * key).sum(dim=1) / temperature, others)


def info_nce_of_logits(own: Float[Tensor, "batch"], others: Float[Tensor, "batch"]) -> Float[Tensor, ""]:
    """InfoNCE from the logit of each query's own key and the log-sum-exp of its negatives' logits.

    -log( exp(own) / (exp(own) + exp(others)) ) is softplus(others - own)
    """
    return F.softplus(others - own).mean()


class Contrast(Loss):
    """A loss in which the classes of a sample compete, or the samples of a class, or both. `per_row` is its formula:
    one value for each sample, given the logits. For the class way it gets the transposed batch.

    "mean" is over the rows that have positives (0 if none has), "none" gives the rows, and `ways="both"` adds what the
    two ways give.
    """

    elementwise = False
    WAYS = ("sample", "class", "both")

    def __init__(self, ways: str, temperature: float, reduction: str) -> None:
        super().__init__(temperature, reduction)
        if ways not in self.WAYS:
            raise unknown_name("ways", ways, self.WAYS)
        if ways == "both" and reduction == "none":
            raise ConfigError("reduction none has no single shape for ways both: use ways sample or class, or a mean")
        self.ways = ways

    def per_row(
        self, logits: Float[Tensor, "rows columns"], labels: Num[Tensor, "rows columns"]
    ) -> Float[Tensor, "rows"]:
        raise NotImplementedError

    def forward(self, logits: Matrix, labels: Labels, pseudo: Matrix | None = None, index: Index = None) -> Tensor:
        logits = self.scaled(logits)
        if self.ways == "both":
            return self.one_way(logits, labels) + self.one_way(logits.T, labels.T)
        return self.one_way(logits, labels) if self.ways == "sample" else self.one_way(logits.T, labels.T)

    def annotated_only(
        self, logits: Matrix, labels: Labels, pseudo: Matrix | None = None, index: Index = None
    ) -> Tensor:
        # Not minus infinity: the gradient of a row of nothing else would be NaN.
        return self.forward(at_least_fp32(logits).masked_fill(labels == 0, -1e30), labels, pseudo, index)

    def one_way(self, logits: Float[Tensor, "rows columns"], labels: Num[Tensor, "rows columns"]) -> Tensor:
        loss = self.per_row(logits, labels)
        if self.reduction == "none":
            return loss
        counted = (labels > 0).any(dim=1).sum().clamp(min=1)
        return loss.sum() / counted if self.reduction == "mean" else loss.sum()


@register("softmax")
class Softmax(Contrast):
    """Softmax with several positives; with neighbours as labels it is the kNN softmax of Van Gansbeke et al.
    (https://arxiv.org/abs/2106.05967), Eq. 10 and 14 of the MLS supplement.

        -1/|P| sum_{i in P} log softmax(x)_i        x [batch, classes], P = the sample's positives

    The denominator holds all classes, the positives too; 0 and -1 are both negatives. "mean" is over the samples that
    have positives (0 if none has); "none" gives [batch], 0 for a sample without.

    ways  "sample" as above; "class" the same for each class over the samples of the batch ("none" gives [classes]);
          "both" their sum.

    >>> import torch
    >>> logits = torch.zeros(2, 4, requires_grad=True)
    >>> loss = Softmax()(logits, labels=torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]))
    >>> round(loss.item(), 4)  # log 4; the second sample does not count
    1.3863
    """

    def __init__(self, ways: str = "sample", temperature: float = 1.0, reduction: str = "mean") -> None:
        super().__init__(ways, temperature, reduction)

    def per_row(
        self, logits: Float[Tensor, "rows columns"], labels: Num[Tensor, "rows columns"]
    ) -> Float[Tensor, "rows"]:
        positive = labels > 0
        log_share = F.log_softmax(logits, dim=1)
        return -log_share.masked_fill(~positive, 0.0).sum(dim=1) / positive.sum(dim=1).clamp(min=1)
