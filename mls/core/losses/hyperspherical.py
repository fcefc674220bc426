"""The hyperspherical margin loss: it takes cosines, and learns their scale and margin. The cosine classifier that makes
them is elsewhere."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor, nn

from mls.core.losses import Index, Labels, Loss, Matrix, at_least_fp32, register, require


@register("hml")
class HypersphericalMargin(Loss):
    """HML, "Hyperspherical Learning in Multi-Label Classification", ECCV 2022
    (https://doi.org/10.1007/978-3-031-19806-9_3): cross-entropy with a margin on angles.

        p = sigmoid(scale cos(theta + margin)),  cos(theta) = x        x [batch, classes], cosines
        an(p) + | sum_{positives} (1 - p) - sum_{0 and -1} p |

    The first term is a mean over batch and classes. The second, the adaptive one, is a sum over the batch and reaches
    only scale and margin. A larger margin strengthens positives and weakens negatives. There is no reduction and no
    temperature to choose: `scale` takes its place.

    scale, margin  where the learnt values start, the paper's; the margin acts within 0 to pi/2.
    learn          False: scale and margin stay as they are.
    adaptive       False: without the second term. With learn=False the paper's loss of a fixed margin.

    The paper does not say at what rate scale and margin learn. The adaptive term's gradient for the margin grows
    with the batch: hundreds to thousands for 64 x 80 labels, where the mean's is below 5. In a trial of that size (SGD,
    rate 0.1, momentum 0.9) a multiplier of 1e-3 threw the margin beyond pi/2 within ten steps, 1e-4 made it jump, and
    from 1e-5 down it settled: hence `lr_multiplier`. More labels in a batch need less. Under Adam,
    whose step does not depend on the gradient's size, the multiplier is 1 (`mls.core.losses.own_rate`).

    >>> loss = HypersphericalMargin()(torch.zeros(1, 2), labels=torch.tensor([[1, 0]]))
    >>> round(loss.item(), 4)  # logits of -20 sin(0.3): 2.9577 + |0.9973 - 0.0027|
    3.9525
    """

    takes = "cosines"
    elementwise = False
    lr_multiplier = 1e-5
    summed_gradient = True
    scale: Tensor
    margin: Tensor

    def __init__(self, scale: float = 20.0, margin: float = 0.3, learn: bool = True, adaptive: bool = True) -> None:
        super().__init__()
        require(scale > 0, "scale", scale, "a number above 0")
        require(0 <= margin <= math.pi / 2, "margin", margin, "an angle from 0 to pi/2")
        for name, value in (("scale", scale), ("margin", margin)):
            if learn:
                self.register_parameter(name, nn.Parameter(torch.tensor(value)))
            else:
                self.register_buffer(name, torch.tensor(value))
        self.learn, self.adaptive = learn, adaptive

    def logits(self, cosines: Matrix) -> Matrix:
        """scale cos(theta + margin) without the arc cosine, whose gradient is infinite at cosines of 1 and -1."""
        cosines = at_least_fp32(cosines)
        sines = ((1 - cosines) * (1 + cosines)).clamp(min=1e-6).sqrt()
        # From outside the range the gradient is the one at its end, not 0, so that the margin can come back.
        margin = self.margin + (self.margin.clamp(0, math.pi / 2) - self.margin).detach()
        return self.scale * (cosines * margin.cos() - sines * margin.sin())

    def predict(self, cosines: Matrix) -> Matrix:
        """Probabilities: the margin acts in a test too."""
        return torch.sigmoid(self.logits(cosines))

    def forward(self, logits: Matrix, labels: Labels, pseudo: Matrix | None = None, index: Index = None) -> Tensor:
        positive = labels > 0
        scores = self.logits(logits)
        loss = F.binary_cross_entropy_with_logits(scores, positive.to(scores.dtype))
        return loss + self.imbalance(logits, positive, ~positive)

    def annotated_only(
        self, logits: Matrix, labels: Labels, pseudo: Matrix | None = None, index: Index = None
    ) -> Tensor:
        positive, known = labels > 0, labels != 0
        scores = self.logits(logits)
        target, weight = positive.to(scores.dtype), known.to(scores.dtype)
        loss = F.binary_cross_entropy_with_logits(scores, target, weight, reduction="sum") / weight.sum().clamp(min=1)
        return loss + self.imbalance(logits, positive, known & ~positive)

    def imbalance(
        self, cosines: Matrix, positive: Bool[Tensor, "batch classes"], negative: Bool[Tensor, "batch classes"]
    ) -> Tensor | float:
        """The adaptive term."""
        if not self.adaptive:
            return 0.0
        fixed = self.logits(cosines.detach())
        short = torch.sigmoid(-fixed).masked_fill(~positive, 0.0).sum()
        over = torch.sigmoid(fixed).masked_fill(~negative, 0.0).sum()
        return (short - over).abs()
