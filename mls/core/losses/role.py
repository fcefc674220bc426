"""Losses that know how many positives to expect: EPR, and ROLE, which also learns an estimate of every label."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor, nn

from mls.core.losses import Index, Labels, Loss, Matrix, at_least_fp32, register, require
from mls.core.losses.assumed_negative import of_known
from mls.errors import ConfigError
from mls.streams import generator

SURE = math.log(0.995 / 0.005)  # the logit that an estimate of a known label starts from
UNSURE = math.log(0.6 / 0.4)  # the others start within this of 0


def surplus(logits: Matrix, expected: float) -> Float[Tensor, ""]:
    """((mean over samples of the sum of f) - expected)^2 / classes^2."""
    return ((torch.sigmoid(logits).sum(dim=1).mean() - expected) / logits.shape[1]).square()


@register("epr")
class ExpectedPositives(Loss):
    """Expected positive regularisation, EPR of Cole et al. (https://arxiv.org/abs/2106.09708): fit the known labels and
    predict as many positives a sample as are expected.

        (-log f of positives - log(1 - f) of -1) / (batch * classes)
        + ((mean over samples of sum_c f) - expected_positives)^2 / classes^2        f = sigmoid(x), x [batch, classes]

    The paper has no known negatives; here they join the first term. There is no reduction to choose.

    expected_positives  a sample: 1.5 VOC, 2.9 COCO, 1.9 NUS-WIDE, 31.4 CUB in the paper.

    >>> loss = ExpectedPositives(expected_positives=1.0)(torch.zeros(1, 4), labels=torch.tensor([[1, 0, 0, 0]]))
    >>> round(loss.item(), 4)  # log(2) / 4 + (2 - 1)^2 / 16
    0.2358
    """

    elementwise = False

    @classmethod
    def defaults_for(cls, positives: float) -> dict[str, Any]:
        return {"expected_positives": positives}

    def __init__(self, expected_positives: float = 1.5, temperature: float = 1.0) -> None:
        super().__init__(temperature)
        require(expected_positives >= 0, "expected_positives", expected_positives, "a number from 0 up")
        self.expected_positives = expected_positives

    def forward(self, logits: Matrix, labels: Labels, pseudo: Matrix | None = None, index: Index = None) -> Tensor:
        logits = self.scaled(logits)
        return of_known(logits, labels).mean() + surplus(logits, self.expected_positives)


@register("role")
class Role(ExpectedPositives):
    """Regularised online label estimation, ROLE of Cole et al. (https://arxiv.org/abs/2106.09708): the labels of all
    training samples are learnt beside the network, and each of the two is a target for the other.

        0.5 (K(f) + K(e) + BCE(f, e) + BCE(e, f)) + 0.5 (R(f) + R(e))        f = sigmoid(x), x [batch, classes]

    e = sigmoid(estimates) of these samples [batch, classes]; K is the mean cross-entropy of the known labels with 0 for
    unknown ones; BCE(a, b) the mean cross-entropy of a to the target b, which gets no gradient; R the second term of
    `epr`. There is no reduction to choose.

    `observe(labels)` makes `estimates` [samples, classes], logits that start from 0.995 for positives and at random
    around one half for unknown labels; a known negative, which the paper does not have, starts from 0.005 and joins K.
    The random start is the same in every run. `forward` needs `index`. A saved state brings its estimates along.

    expected_positives  as in `epr`.

    >>> labels = torch.tensor([[1, 0, 0, 0]])
    >>> loss = Role(expected_positives=1.0)
    >>> loss.observe(labels)
    >>> loss.estimates.data[:, 1:] = 0
    >>> round(loss(torch.zeros(1, 4), labels, index=torch.tensor([0])).item(), 4)
    1.1263
    """

    needs_index = True
    only_supervised = True
    lr_multiplier = 10.0
    estimates: nn.Parameter | None

    def __init__(self, expected_positives: float = 1.5, temperature: float = 1.0) -> None:
        super().__init__(expected_positives, temperature)
        self.register_parameter("estimates", None)

    def observe(self, labels: Num[Tensor, "samples classes"]) -> None:
        chance = torch.rand(labels.shape, generator=generator(0, "role")).to(labels.device)
        start = UNSURE * (2 * chance - 1)
        self.estimates = nn.Parameter(torch.where(labels == 0, start, SURE * labels.sign()))

    def forward(self, logits: Matrix, labels: Labels, pseudo: Matrix | None = None, index: Index = None) -> Tensor:
        if self.estimates is None:
            raise ConfigError(
                "loss role has no labels to estimate: call observe(labels) with those of all samples first"
            )
        if index is None:
            raise ConfigError("loss role needs to know whose labels these are: pass the samples' row numbers as index")
        estimates = at_least_fp32(self.estimates[index])
        logits = self.scaled(logits)
        crossed = cross_entropy(logits, estimates) + cross_entropy(estimates, logits)
        fitted = of_known(logits, labels).mean() + of_known(estimates, labels).mean()
        regular = surplus(logits, self.expected_positives) + surplus(estimates, self.expected_positives)
        return 0.5 * (fitted + crossed + regular)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = state_dict.get(f"{prefix}estimates")
        if saved is not None and (self.estimates is None or self.estimates.shape != saved.shape):
            self.estimates = nn.Parameter(torch.empty_like(saved))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def cross_entropy(logits: Matrix, target: Matrix) -> Float[Tensor, ""]:
    """Of one prediction to another, both logits; the target gets no gradient."""
    return F.binary_cross_entropy_with_logits(logits, torch.sigmoid(target.detach()).to(logits.dtype))
