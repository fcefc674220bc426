"""The two-way loss: positives and negatives compete in log-sum-exps, over the classes of each sample and over the
samples of each class. How the two ways are put together is in contrastive.py."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Num
from torch import Tensor

from mls.core.losses import Index, Labels, Matrix, register, require
from mls.core.losses.contrastive import Contrast
from mls.errors import ConfigError


@register("two_way")
class TwoWay(Contrast):
    """The two-way multi-label loss of Kobayashi, CVPR 2023
    (https://openaccess.thecvf.com/content/CVPR2023/html/Kobayashi_Two-Way_Multi-Label_Loss_CVPR_2023_paper.html).

        softplus( Tn log sum_{n in N} exp(x_n / Tn) + Tp log sum_{p in P} exp(-x_p / Tp) )        x [batch, classes]

    for each sample over its classes, and for each class over the samples of the batch. P are the positives, N is 0 and
    -1. "mean" is over the samples (classes) that have positives; one without positives or without negatives gives 0.

    temperature_pos  Tp: the higher it is, the more evenly the positives share the pull. Idle with one positive.
    temperature_neg  Tn: at 1 and with one positive, a sample's loss is its softmax cross-entropy.
    ways             "both" (their sum), "sample" or "class"; reduction "none" gives [batch] or [classes].
    ignore_unknown   leave 0 out, so that only -1 is negative, as `annotated_only` does for any loss.

    gpu_batch        take the loss of each part of so many images and their mean. None: of the whole batch at once.

    The class way depends on the batch, its size too. Supervised training gathers the batch of all processes for it (512
    images in the paper's protocol), but each GPU of the released code sees its own images alone (512 / 4 = 128): that
    is gpu_batch=128. In pretraining each process has its own part.

    >>> loss = TwoWay(ways="sample")(torch.zeros(1, 4), labels=torch.tensor([[1, 0, 0, -1]]))
    >>> round(loss.item(), 4)  # log(1 + 3)
    1.3863
    """

    def __init__(
        self,
        temperature_pos: float = 4.0,
        temperature_neg: float = 1.0,
        ways: str = "both",
        ignore_unknown: bool = False,
        gpu_batch: int | None = None,
        temperature: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__(ways, temperature, reduction)
        require(temperature_pos > 0, "temperature_pos", temperature_pos, "a number above 0")
        require(temperature_neg > 0, "temperature_neg", temperature_neg, "a number above 0")
        self.temperature_pos, self.temperature_neg = temperature_pos, temperature_neg
        if gpu_batch is not None:
            require(gpu_batch > 0, "gpu_batch", gpu_batch, "a number of images above 0, or null")
            if reduction != "mean":
                raise ConfigError("gpu_batch takes the mean over parts of the batch: use it with reduction mean")
        self.ignore_unknown, self.gpu_batch = ignore_unknown, gpu_batch

    def forward(self, logits: Matrix, labels: Labels, pseudo: Matrix | None = None, index: Index = None) -> Tensor:
        size, of_part = self.gpu_batch or max(len(logits), 1), super().forward
        parts = zip(logits.split(size), labels.split(size), strict=True)
        values = [of_part(*part) for part in parts]
        return torch.stack(values).mean() if len(values) > 1 else values[0]

    def per_row(
        self, logits: Float[Tensor, "rows columns"], labels: Num[Tensor, "rows columns"]
    ) -> Float[Tensor, "rows"]:
        positive = labels > 0
        negative = labels < 0 if self.ignore_unknown else ~positive
        push = self.temperature_neg * log_sum_exp(logits / self.temperature_neg, negative)
        pull = self.temperature_pos * log_sum_exp(-logits / self.temperature_pos, positive)
        contrasted = positive.any(dim=1) & negative.any(dim=1)
        return -F.logsigmoid(-(push + pull)).masked_fill(~contrasted, 0.0)


def log_sum_exp(values: Float[Tensor, "rows columns"], mask: Bool[Tensor, "rows columns"]) -> Float[Tensor, "rows"]:
    """Over the entries in the mask. A row without any gives a finite number that means nothing: the gradient of the
    log of an empty sum would be NaN, even where nothing uses it."""
    left_out = ~mask & mask.any(dim=1, keepdim=True)
    return torch.logsumexp(values.masked_fill(left_out, -torch.inf), dim=1)
