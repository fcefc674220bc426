"""SimSiam (https://arxiv.org/abs/2011.10566): one encoder, two crops, a predictor on one side and no gradient on the
other. No negatives and no memory. Short runs need `model.head_norm=batch`, without which it collapses.

    loss = -(cos(p1, z2) + cos(p2, z1)) / 2        p = predictor(z), no gradient through z [batch, projection]

The paper's projection head has three layers and its predictor learns at a constant rate; here the head is
`model.projection`'s and one schedule serves all.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mls.config import Config, SimSiamOptions
from mls.core.health import spread
from mls.core.method import Method, StepOutput
from mls.core.methods import register
from mls.data import Views
from mls.models import Backbone, Precision, build_encoder
from mls.models.heads import predictor
from mls.streams import initialisation


@register("simsiam", SimSiamOptions)
class SimSiam(Method):
    def __init__(self, config: Config, precision: Precision = "fp32", image_labels: Tensor | None = None) -> None:
        super().__init__(config, precision, image_labels)
        options = cast(SimSiamOptions, config.objective)
        self.encoder = build_encoder(config.model, config.run.seed, precision)
        with initialisation(config.run.seed, "predictor"):
            self.predictor = predictor(config.model.projection, options.predictor)

    @property
    def backbone(self) -> Backbone:
        return self.encoder.backbone

    def forward(self, views: Views) -> StepOutput:
        (_, z1), (_, z2) = (self.encoder(images) for images in views.images[:2])
        loss = -(cosine(self.predictor(z1), z2) + cosine(self.predictor(z2), z1)) / 2
        # A collapsed network has a perfect loss: the spread of z tells (1 is uniform on the sphere, 0 collapsed).
        scalars = {"loss": loss.detach(), "health/projection_std": spread(F.normalize(z1.detach(), dim=1))}
        return StepOutput(loss, scalars)


def cosine(p: Float[Tensor, "batch dim"], z: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """The mean cosine, without gradient through z."""
    return F.cosine_similarity(p.float(), z.detach(), dim=1).mean()
