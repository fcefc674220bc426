"""BYOL (https://arxiv.org/abs/2006.07733): the query encoder and a predictor predict the slowly moving key
encoder's projection of the other crop. No negatives and no memory.

    loss = 4 - 2 cos(p1, z2') - 2 cos(p2, z1')        p = predictor(z), z' the key encoder's [batch, projection]

`model.momentum` is the key encoder's (the paper lets it rise from 0.996 to 1: `model.final_momentum=1`), both crops
have MoCo-v2's augmentation. Short runs need `model.head_norm=batch`.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mls.config import BYOLOptions, Config
from mls.core.health import spread
from mls.core.method import MomentumMethod, StepOutput
from mls.core.methods import register
from mls.core.methods.simsiam import cosine
from mls.data import Views
from mls.models import Precision, build_pair
from mls.models.heads import predictor
from mls.streams import initialisation


@register("byol", BYOLOptions)
class BYOL(MomentumMethod):
    def __init__(self, config: Config, precision: Precision = "fp32", image_labels: Tensor | None = None) -> None:
        super().__init__(config, precision, image_labels)
        options = cast(BYOLOptions, config.objective)
        self.pair = build_pair(config.model, config.run.seed, precision)
        with initialisation(config.run.seed, "predictor"):
            self.predictor = predictor(config.model.projection, options.predictor)

    def forward(self, views: Views) -> StepOutput:
        x1, x2 = views.images[:2]
        (_, z1), (_, z2) = self.pair.query(x1), self.pair.query(x2)
        with torch.no_grad():
            (_, key1), (_, key2) = self.pair.key(x1), self.pair.key(x2)
        loss = 4 - 2 * cosine(self.predictor(z1), key2) - 2 * cosine(self.predictor(z2), key1)
        scalars = {"loss": loss.detach(), "health/projection_std": spread(F.normalize(z1.detach(), dim=1))}
        return StepOutput(loss, scalars)
