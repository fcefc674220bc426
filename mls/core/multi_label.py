"""A loss of the registry over the rows of a dictionary: labels are +1 for a query's positives and 0 for all other rows.
Whatever can be is computed for a part of the rows at a time: neither the labels nor the products exist for all."""

from __future__ import annotations

from jaxtyping import Float, Int64
from torch import Tensor

from mls.config import MLSOptions
from mls.core import losses
from mls.core.positives import Positives
from mls.core.queried_rows import QueriedRows, Sums
from mls.errors import ConfigError

LEFT_OUT = {"logits": -1e4, "cosines": -1.0}  # of a row that counts for nothing: a negative far from the query


def build_loss(options: MLSOptions, sharded: bool) -> losses.Loss:
    """The loss of `objective.loss`, or the sentence that says why it cannot label a dictionary's rows."""
    name = options.loss
    loss = losses.build(name, **losses.defaults(name, positives=float(options.k)) | options.options)
    if loss.only_supervised:
        raise ConfigError(
            f"objective.loss={name} learns from the labels of every image, or with several networks, but here the "
            "labels are the dictionary's rows, which change at every step: use objective.loss=em or an"
        )
    if loss.reduction == "none":
        raise ConfigError("objective.options.reduction=none gives no single number to train on: use mean or sum")
    if sharded and not loss.separable:
        raise ConfigError(
            f"objective.loss={name} looks at all rows of the dictionary at once, but "
            "dictionary.sharded=true keeps them on different processes: set it to false, or use objective.loss=an"
        )
    if options.labels_from == "regions" and options.regions.soft and not loss.elementwise:
        raise ConfigError(f"objective.regions.soft weighs single entries, objective.loss={name} has none: set it to 0")
    if options.normalise != "mean" and not loss.elementwise:
        raise ConfigError(
            f"objective.normalise={options.normalise} weighs single entries, "
            f"objective.loss={name} has none: use objective.normalise=mean"
        )
    return loss


class MultiLabelTerm:
    """The loss with its reduction over a dictionary's rows (`objective.normalise`)."""

    def __init__(self, loss: losses.Loss, options: MLSOptions) -> None:
        self.loss, self.options = loss, options
        self.reduction = loss.reduction
        if loss.elementwise:
            loss.reduction = "none"  # entries are summed over parts of the rows, and reduced in `reduced`
        self.scale = options.temperature if loss.takes == "logits" else 1.0

    def __call__(
        self, z1: Float[Tensor, "batch dim"], rows: QueriedRows, positives: Positives
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The loss, and for the log the mean cosine of the positives and of all rows."""
        memory, left_out = self.options.classify_with, LEFT_OUT[self.loss.takes] * self.scale
        entries = lambda cosines, labels: self.loss(cosines / self.scale, labels)
        if self.loss.elementwise:
            sums = rows.sums(memory, z1, positives, entries, left_out, whole=not self.loss.separable)
            loss, cosines, near = self.reduced(sums, positives.counts(), rows.counts), sums.cosines, sums.near
        else:
            products, labels = rows.products(memory, z1), positives.labels(slice(0, len(rows)))  # [batch, rows]
            loss = entries(rows.without_own(products, left_out), labels)
            cosines, near = products.detach().sum(1), (products.detach() * labels).sum(1)
        return loss, {
            "cosine/positives": near.sum() / positives.counts().sum().clamp(min=1),
            "cosine/rows": cosines.sum() / (len(z1) * len(rows)),
        }

    def reduced(
        self, sums: Sums, positives: Int64[Tensor, "batch"], counts: Int64[Tensor, "batch"]
    ) -> Float[Tensor, ""]:
        """One number of each query's entries; it has `positives` and `counts` rows in all."""
        total, of_positives = sums.entries, sums.entries_of_positives
        if self.options.normalise == "mean":
            return total.sum() if self.reduction == "sum" else total.sum() / counts.sum()
        if self.options.normalise == "positives":
            return (total / positives.clamp(min=1)).mean()
        pull = of_positives / positives.clamp(min=1)
        push = (total - of_positives) / (counts - positives).clamp(min=1)
        return (pull + push).mean()
