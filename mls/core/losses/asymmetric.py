"""Losses that focus on hard entries: a confident prediction weighs less, on either side or mostly among negatives."""

import math

import torch
import torch.nn.functional as F

from mls.core.losses import Labels, Loss, Matrix, register, require


@register("focal")
class Focal(Loss):
    """The focal loss (https://arxiv.org/abs/1708.02002), without its balance weight.

        -(1 - f)^gamma_pos log f for a positive, -f^gamma_neg log(1 - f) for 0 and -1
                                                                        f = sigmoid(x), x [batch, classes]

    The gradient goes through the weight too. "mean" is over batch and classes.

    >>> Focal()(torch.zeros(1, 2), labels=torch.tensor([[1, 0]])).item()  # log(2) / 4
    0.1732867956161499
    """

    separable = True

    def __init__(
        self, gamma_pos: float = 2.0, gamma_neg: float = 2.0, temperature: float = 1.0, reduction: str = "mean"
    ) -> None:
        super().__init__(temperature, reduction)
        require(gamma_pos >= 0, "gamma_pos", gamma_pos, "a number from 0 up")
        require(gamma_neg >= 0, "gamma_neg", gamma_neg, "a number from 0 up")
        self.gamma_pos, self.gamma_neg = gamma_pos, gamma_neg

    def entries(self, logits: Matrix, labels: Labels, *_: object) -> Matrix:
        log_f, log_rest = F.logsigmoid(logits), F.logsigmoid(-logits)
        # Powers as exp(gamma log ...): below 1 the gradient of f^gamma itself is infinite where f rounds to 0.
        pull = -(self.gamma_pos * log_rest).exp() * log_f
        push = -(self.gamma_neg * log_f).exp() * log_rest
        return torch.where(labels > 0, pull, push)


@register("asl")
class Asymmetric(Loss):
    """The asymmetric loss, ASL (https://arxiv.org/abs/2009.14119): negatives are focused harder than positives, and
    those below `clip` cost nothing.

        -(1 - f)^gamma_pos log f for a positive,
        -g^gamma_neg log(1 - g) for 0 and -1,  g = max(f - clip, 0)        f = sigmoid(x), x [batch, classes]

    detach_weight  no gradient through the two powers, as in the released training; False: the formula's own gradient.
    reduction      "sum" over batch and classes, as released; its size grows with both.

    The released training script sets gamma_pos to 0.

    >>> round(Asymmetric()(torch.zeros(1, 2), labels=torch.tensor([[1, 0]])).item(), 4)  # 0.3466 + 0.0245
    0.3711
    """

    separable = True

    def __init__(
        self,
        gamma_neg: float = 4.0,
        gamma_pos: float = 1.0,
        clip: float = 0.05,
        detach_weight: bool = True,
        temperature: float = 1.0,
        reduction: str = "sum",
    ) -> None:
        super().__init__(temperature, reduction)
        require(gamma_neg >= 0, "gamma_neg", gamma_neg, "a number from 0 up")
        require(gamma_pos >= 0, "gamma_pos", gamma_pos, "a number from 0 up")
        require(0 <= clip < 1, "clip", clip, "a number from 0 to below 1")
        self.gamma_neg, self.gamma_pos, self.clip, self.detach_weight = gamma_neg, gamma_pos, clip, detach_weight

    def entries(self, logits: Matrix, labels: Labels, *_: object) -> Matrix:
        log_f, log_rest = F.logsigmoid(logits), F.logsigmoid(-logits)
        shifted = (torch.sigmoid(logits) - self.clip).clamp(min=0)
        log_shifted_rest = log_rest
        if self.clip > 0:  # log(1 - f + clip), never above 0
            log_shifted_rest = torch.logaddexp(log_rest, log_rest.new_tensor(math.log(self.clip))).clamp(max=0)
        pull_weight = (self.gamma_pos * log_rest).exp()
        # Where `shifted` is 0 so is the loss, but below gamma 1 the power's gradient is infinite: take another weight.
        silent = shifted < torch.finfo(shifted.dtype).tiny
        push_weight = shifted.masked_fill(silent, 1.0) ** self.gamma_neg
        if self.detach_weight:
            pull_weight, push_weight = pull_weight.detach(), push_weight.detach()
        return torch.where(labels > 0, -pull_weight * log_f, -push_weight * log_shifted_rest)
