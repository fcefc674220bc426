"""BYOL as somebody outside mls would write it: a predictor and a slowly moving key encoder. What it computes is
explained in mls/core/methods/byol.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mls import methods
from mls.config import Config, ObjectiveConfig, positive
from mls.core.health import spread
from mls.data import Views
from mls.methods import Method, StepOutput
from mls.models import Backbone, Precision, build_pair
from mls.models.heads import predictor
from mls.streams import derive


@dataclass(frozen=True)
class Options(ObjectiveConfig):
    method: str = "outside_byol"
    predictor: int = positive(4096)  # width of the predictor's hidden layer


@methods.register("outside_byol", Options)
class BYOL(Method):
    def __init__(self, config: Config, precision: Precision = "fp32", image_labels: Tensor | None = None) -> None:
        super().__init__(config, precision, image_labels)
        options = cast(Options, config.objective)
        self.pair = build_pair(config.model, config.run.seed, precision)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(config.run.seed, "init", "predictor"))
            self.predictor = predictor(config.model.projection, options.predictor)

    @property
    def backbone(self) -> Backbone:
        return self.pair.query.backbone

    def forward(self, views: Views) -> StepOutput:
        x1, x2 = views.images[:2]
        (_, z1), (_, z2) = self.pair.query(x1), self.pair.query(x2)
        with torch.no_grad():
            (_, key1), (_, key2) = self.pair.key(x1), self.pair.key(x2)
        loss = 4 - 2 * cosine(self.predictor(z1), key2) - 2 * cosine(self.predictor(z2), key1)
        scalars = {"loss": loss.detach(), "health/projection_std": spread(F.normalize(z1.detach(), dim=1))}
        return StepOutput(loss, scalars)

    def after_step(self, outputs: list[StepOutput]) -> None:
        self.pair.update(self.config.model.momentum)


def cosine(p: Tensor, z: Tensor) -> Tensor:
    """The mean cosine, without gradient through z."""
    return F.cosine_similarity(p.float(), z.detach(), dim=1).mean()
