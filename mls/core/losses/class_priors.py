"""CRISP: the share of images that have a class, estimated between epochs, is what its unknown labels train against."""

import math

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

from mls.core.losses import Index, Labels, Matrix, register, require
from mls.core.losses.assumed_negative import AssumedNegative


@register("crisp")
class ClassPriors(AssumedNegative):
    """CRISP, "Can Class-Priors Help Single-Positive Multi-Label Learning?" (https://arxiv.org/abs/2309.13886), Eq. 7,
    the risk of the absolute loss that is left when only positives are known:

        2 pi_c mean over the positives of class c of (1 - f) + | mean over the batch of f - pi_c |

    f = sigmoid(x), x [batch, classes]; the mean over classes here, their sum in the paper. Until `relabel` has
    estimated the priors pi_c it is `an`, the paper's warm-up; known negatives count in that alone. The paper trains
    with a modification of Eq. 7 (Eq. 8, a weight lambda and the logits), which is not here: its formula could not be
    verified, and no code was released.

    delta, tau  of the estimate (`class_prior`); 0.01 and 0.01 in the paper.

    >>> loss = ClassPriors()
    >>> loss.observe(torch.zeros(1, 2))
    >>> loss.priors[:] = torch.tensor([0.5, 0.25])
    >>> loss(torch.zeros(1, 2), torch.tensor([[1, 0]])).item()  # (2 * 0.5 * 0.5 + 0 + 0.25) / 2
    0.375
    """

    elementwise = False
    separable = False
    relabels = "epoch"
    only_supervised = True
    priors: Float[Tensor, "classes"] | None

    def __init__(self, delta: float = 0.01, tau: float = 0.01, temperature: float = 1.0) -> None:
        super().__init__(temperature)
        require(0 < delta < 1, "delta", delta, "a number between 0 and 1")
        require(tau >= 0, "tau", tau, "a number from 0 up")
        self.delta, self.tau = delta, tau
        self.register_buffer("priors", None)

    def observe(self, labels: Num[Tensor, "samples classes"]) -> None:
        self.priors = torch.full((labels.shape[1],), math.nan)

    def forward(self, logits: Matrix, labels: Labels, pseudo: Matrix | None = None, index: Index = None) -> Tensor:
        if self.priors is None or bool(self.priors.isnan().any()):
            return super().forward(logits, labels)
        scores, positive = torch.sigmoid(self.scaled(logits)), labels > 0
        missed = ((1 - scores) * positive).sum(0) / positive.sum(0).clamp(min=1)
        return (2 * self.priors * missed + (scores.mean(0) - self.priors).abs()).mean()

    @torch.no_grad()
    def relabel(
        self, labels: Tensor, pseudo: Tensor | None, outputs: Tensor, share: float = 0.0, rounds: int = 1
    ) -> tuple[Tensor, Tensor | None]:
        """No label changes, but the priors are estimated anew."""
        assert self.priors is not None
        columns = zip(outputs.unbind(1), (labels > 0).unbind(1), strict=True)
        self.priors.copy_(torch.tensor([class_prior(*column, self.delta, self.tau) for column in columns]))
        return labels, pseudo


def class_prior(scores: Float[Tensor, "samples"], positive: Bool[Tensor, "samples"], delta: float, tau: float) -> float:
    """The share of positives among all samples, given some of them: with q(z) the share of all samples that score at
    least z, and p(z) that of the positives, it is q / p at the score z where q / p is surely smallest (Eq. 2):

        q(z) / p(z) + (1 + tau) / p(z) (sqrt(log(4 / delta) / (2 n)) + sqrt(log(4 / delta) / (2 n_p)))

    At most 1. A class without positives has 0.

    >>> class_prior(torch.tensor([0.9, 0.8, 0.2, 0.1]), torch.tensor([True, False, False, False]), 0.01, 0.01)
    0.25
    """
    if not positive.any():
        return 0.0
    at_least = lambda values: 1 - torch.searchsorted(values.sort().values, thresholds) / len(values)
    thresholds = scores.unique()
    of_all, of_positives = at_least(scores), at_least(scores[positive])
    spread = sum(math.sqrt(math.log(4 / delta) / (2 * count)) for count in (len(scores), int(positive.sum())))
    best = ((of_all + (1 + tau) * spread) / of_positives).argmin()
    return min(1.0, float(of_all[best] / of_positives[best]))
