"""SimSiam as somebody outside mls would write it: one encoder and a predictor. What it computes is
explained in mls/core/methods/simsiam.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mls import methods
from mls.config import Config, ObjectiveConfig, positive
from mls.core.health import spread
from mls.data import Views
from mls.methods import Method, StepOutput
from mls.models import Backbone, Precision, build_encoder
from mls.models.heads import predictor
from mls.streams import derive


@dataclass(frozen=True)
class Options(ObjectiveConfig):
    method: str = "outside_simsiam"
    predictor: int = positive(512)  # width of the predictor's hidden layer


@methods.register("outside_simsiam", Options)
class SimSiam(Method):
    def __init__(self, config: Config, precision: Precision = "fp32", image_labels: Tensor | None = None) -> None:
        super().__init__(config, precision, image_labels)
        options = cast(Options, config.objective)
        self.encoder = build_encoder(config.model, config.run.seed, precision)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(config.run.seed, "init", "predictor"))
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
