"""Two networks that learn at once from the same batch: what has a small loss is taken to be labelled rightly."""

from fractions import Fraction

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mls.core.losses import Index, Labels, Matrix, register, require
from mls.core.losses.assumed_negative import AssumedNegative
from mls.errors import unknown_name

Pair = Float[Tensor, "batch two classes"]
ITEMS = ("images", "labels")


class TwoNetworks(AssumedNegative):
    """What both share: which items of a batch they learn from, a smaller share with each epoch up to `gradual`."""

    elementwise = False
    separable = False
    networks = 2
    only_supervised = True

    def __init__(self, forget_rate: float, gradual: int, items: str, temperature: float) -> None:
        super().__init__(temperature)
        require(0 <= forget_rate < 1, "forget_rate", forget_rate, "a share from 0 to 1, without 1")
        require(gradual > 0, "gradual", gradual, "a number of epochs above 0")
        if items not in ITEMS:
            raise unknown_name("items", items, ITEMS)
        self.forget_rate, self.gradual, self.items, self.epoch = forget_rate, gradual, items, 1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def costs(self, entries: Matrix) -> Float[Tensor, "items"]:
        return entries.mean(1) if self.items == "images" else entries.flatten()

    def small(self, costs: Float[Tensor, "items"]) -> Int64[Tensor, "kept"]:
        """The items with the smallest losses: the share 1 - forget_rate min(epoch / gradual, 1) of them."""
        forgotten = Fraction(str(self.forget_rate)) * min(self.epoch, self.gradual) / self.gradual
        kept = max(1, int((1 - forgotten) * len(costs)))
        return costs.detach().topk(kept, largest=False).indices

    def of_each(self, logits: Pair, labels: Labels) -> list[Float[Tensor, "items"]]:
        """The costs of each network: `an`."""
        return [self.costs(self.entries(one, labels)) for one in self.scaled(logits).unbind(1)]


@register("co_teaching")
class CoTeaching(TwoNetworks):
    """Co-teaching (https://arxiv.org/abs/1804.06872) with binary cross-entropy, as the supplement of HML compares with
    it: each network learns from the items that have the smallest losses with the *other*.

        mean over S2 of l1 + mean over S1 of l2        logits [batch, 2, classes], labels [batch, classes]

    l1 and l2 are the networks' losses `an`, the mean over an image's classes; S1 and S2 the R(t) = 1 - forget_rate
    min(t / gradual, 1) of the items with the smallest of each, in epoch t. The first network is the one that is tested.
    The released code divides by the number of items a second time; the paper does not.

    forget_rate  the share of wrong labels, as far as known. HML's supplement does not say its own.
    items        "images" (the paper's with another cross-entropy) or "labels" (single entries); HML does not say which.

    >>> logits = torch.tensor([[[0.0], [9.0]], [[9.0], [0.0]]])  # two images, two networks, one class
    >>> loss = CoTeaching(forget_rate=0.5, gradual=1)(logits, torch.tensor([[1], [1]]))
    >>> round(loss.item(), 4)  # each learns from the image that the other is sure of: 2 log(2)
    1.3863
    """

    def __init__(
        self, forget_rate: float = 0.2, gradual: int = 10, items: str = "images", temperature: float = 1.0
    ) -> None:
        super().__init__(forget_rate, gradual, items, temperature)

    def forward(self, logits: Pair, labels: Labels, pseudo: Matrix | None = None, index: Index = None) -> Tensor:
        first, second = self.of_each(logits, labels)
        return first[self.small(second)].mean() + second[self.small(first)].mean()


@register("jocor")
class JoCoR(TwoNetworks):
    """JoCoR (https://arxiv.org/abs/2003.02752) with binary cross-entropy, as the supplement of HML compares with it:
    both networks learn from the items with the smallest joint loss, which counts their disagreement.

        mean over S of l,  l = (1 - weight) (l1 + l2) + weight (KL(f1 | f2) + KL(f2 | f1))

    logits [batch, 2, classes], labels [batch, classes], f = sigmoid of the logits; l1, l2 and S as in `co_teaching`.
    The divergences are those of each class by itself, which add up to (f1 - f2) (x1 - x2), and the mean over an image's
    classes. The first network is the one that is tested.

    weight  lambda; 0.1 in the released code. HML's supplement does not say its own.

    >>> loss = JoCoR(weight=0.5, forget_rate=0.0)
    >>> round(loss(torch.tensor([[[0.0], [2.0]]]), torch.tensor([[1]])).item(), 4)
    0.7908
    """

    def __init__(
        self,
        weight: float = 0.1,
        forget_rate: float = 0.2,
        gradual: int = 10,
        items: str = "images",
        temperature: float = 1.0,
    ) -> None:
        super().__init__(forget_rate, gradual, items, temperature)
        require(0 <= weight <= 1, "weight", weight, "a number from 0 to 1")
        self.weight = weight

    def forward(self, logits: Pair, labels: Labels, pseudo: Matrix | None = None, index: Index = None) -> Tensor:
        one, other = self.scaled(logits).unbind(1)
        apart = self.costs((torch.sigmoid(one) - torch.sigmoid(other)) * (one - other))
        joint = (1 - self.weight) * torch.stack(self.of_each(logits, labels)).sum(0) + self.weight * apart
        return joint[self.small(joint)].mean()
