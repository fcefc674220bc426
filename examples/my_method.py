"""A method of your own: Barlow Twins (https://arxiv.org/abs/2103.03230). Two crops of an image should have the same
projection, and no two of its dimensions should say the same.

    loss = sum_i (1 - C_ii)² + redundancy · sum_{i≠j} C_ij²       C = z1ᵀ z2 / batch, z standardised over the batch

mls pretrain mls_scenes_tiny --import examples/my_method.py objective.method=barlow_twins objective.redundancy=0.01
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mls import methods
from mls.config import Config, ObjectiveConfig
from mls.data import Views
from mls.models import Backbone, Precision, build_encoder


@dataclass(frozen=True)
class BarlowTwinsOptions(ObjectiveConfig):
    """The keys that `objective.*` has where `objective.method=barlow_twins`."""

    method: str = "barlow_twins"
    redundancy: float = 0.005


@methods.register("barlow_twins", BarlowTwinsOptions)
class BarlowTwins(methods.Method):
    def __init__(self, config: Config, precision: Precision = "fp32", image_labels: Tensor | None = None) -> None:
        super().__init__(config, precision, image_labels)
        self.options = config.objective
        self.encoder = build_encoder(config.model, config.run.seed, precision)

    @property
    def backbone(self) -> Backbone:  # what is probed, saved and exported
        return self.encoder.backbone

    def forward(self, views: Views) -> methods.StepOutput:  # state moves in `after_step` alone; this method has none
        (_, z1), (_, z2) = (self.encoder(images) for images in views.images[:2])
        correlation = standardised(z1).T @ standardised(z2) / len(z1)  # [projection, projection]
        same = (1 - correlation.diagonal()).square().sum()
        other = correlation.square().sum() - correlation.diagonal().square().sum()
        loss = same + self.options.redundancy * other
        return methods.StepOutput(loss, scalars={"loss": loss.detach(), "loss/redundancy": other.detach()})

    def health(self) -> dict[str, float]:
        return {}  # what is logged every monitor.health_every steps


def standardised(z: Tensor) -> Tensor:
    return torch.nn.functional.batch_norm(z.float(), None, None, training=True)
