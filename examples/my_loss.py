"""A loss of your own: Poly-1 (PolyLoss, https://arxiv.org/abs/2204.12511) on binary cross-entropy. It serves both
pretraining, where the labels are neighbours, and training from weak labels.

mls pretrain mls_scenes_tiny --import examples/my_loss.py objective.loss=poly1 objective.options.epsilon=2
mls eval run spml_scenes --import examples/my_loss.py training.loss=poly1
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mls import losses


@losses.register("poly1")
class Poly1(losses.Loss):
    """-log p + epsilon (1 - p)      p = sigmoid(x) for a label of +1, sigmoid(-x) for 0 and -1; x [batch, classes]

    >>> round(Poly1(epsilon=2)(torch.zeros(1, 1), torch.ones(1, 1)).item(), 4)  # log 2 + 2 (1 - 0.5)
    1.6931
    """

    separable = True  # an entry depends on its own logit and label alone

    def __init__(self, epsilon: float = 1.0, temperature: float = 1.0, reduction: str = "mean") -> None:
        super().__init__(temperature, reduction)
        losses.require(epsilon > -1, "epsilon", epsilon, "a number above -1, below which the loss falls with the error")
        self.epsilon = epsilon

    def entries(self, logits: Tensor, labels: Tensor, *_: object) -> Tensor:  # [batch, classes]
        signed = torch.where(labels > 0, logits, -logits)
        return -F.logsigmoid(signed) + self.epsilon * torch.sigmoid(-signed)
