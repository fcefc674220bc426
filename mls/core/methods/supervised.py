"""Not a pretraining method: the same network, views and engine trained with the true labels. The ceiling of a table."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mls.config import Config
from mls.core.method import StepOutput
from mls.core.methods.moco import MoCo
from mls.data import Views
from mls.errors import ConfigError
from mls.models import EncoderPair
from mls.streams import derive


class Supervised(MoCo):
    def __init__(self, config: Config, pair: EncoderPair, image_labels: Tensor | None = None) -> None:
        super().__init__(config, pair, image_labels)
        if image_labels is None:
            raise ConfigError("objective.method=supervised needs images with labels: this source has none")
        pair.query.head.requires_grad_(False)  # not used here; DDP wants every trained parameter to have a gradient
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(config.run.seed, "init", "classifier"))
            self.classifier = nn.Linear(pair.query.backbone.feature_dim, image_labels.shape[1])

    def forward(self, views: Views) -> StepOutput:
        assert self.image_labels is not None
        keys, _ = self.encode_keys(views)  # the dictionary fills as in the other rows, so its health can be compared
        features, _ = self.pair.query(views.images[0])
        loss = F.binary_cross_entropy_with_logits(self.classifier(features), self.image_labels[views.ids])
        return StepOutput(loss=loss, keys=keys, scalars={"loss": loss.detach()}, query_ids=views.ids)
