"""MoCo-v3 (https://arxiv.org/abs/2104.02057), the recipe for transformers: no dictionary, each image is told from the
others of its batch. With q = predictor(projector(backbone)) of the query encoder and k = projector(backbone) of the key
encoder, all of unit length, and the keys of all processes:

    loss = ctr(q1, k2) + ctr(q2, k1)        ctr(q, k) = 2 τ CE(q · kᵀ / τ, own image)        [batch, batch of all]

The key encoder slows down to a stop: model.momentum=0.99 model.final_momentum=1. Transformers want optim.name=adamw, a
warm-up and model.freeze_patches=true. Projector and predictor are those of its transformers. What the official code has
and this has not: batch statistics over all processes, fixed sine-cosine positions (timm's are learnt), an
initialisation of its own (timm's stands), and an augmentation for each of the crops (blur in 100 and 10 per cent,
solarized 0 and 20 per cent).
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mls.config import Config, MoCoV3Options
from mls.core.health import spread
from mls.core.method import MomentumMethod, StepOutput
from mls.core.methods import register
from mls.data import Views
from mls.distributed import gather, rank
from mls.models import EncoderPair, Precision, build_encoder
from mls.models.heads import normalised_mlp
from mls.streams import initialisation

USUAL = (None, "none", "shuffle")  # of model keys that mean nothing here: what they are where nobody sets them


@register("moco_v3", MoCoV3Options)
class MoCoV3(MomentumMethod):
    def __init__(self, config: Config, precision: Precision = "fp32", image_labels: Tensor | None = None) -> None:
        super().__init__(config, precision, image_labels)
        self.options = options = cast(MoCoV3Options, config.objective)
        encoder, width = build_encoder(config.model, config.run.seed, precision), config.model.projection
        with initialisation(config.run.seed, "projector"):
            encoder.head = normalised_mlp([encoder.backbone.feature_dim, options.hidden, options.hidden, width])
            self.predictor = normalised_mlp([width, options.hidden, width])
        self.pair = EncoderPair(encoder)

    def forward(self, views: Views) -> StepOutput:
        x1, x2 = views.images[:2]
        (_, z1), (_, z2) = self.pair.query(x1), self.pair.query(x2)
        with torch.no_grad():
            k1, k2 = gather([F.normalize(self.pair.key(x)[1], dim=1) for x in (x1, x2)])  # [batch of all, projection]
        contrast = self.cross_entropy(self.predictor(z1), k2) + self.cross_entropy(self.predictor(z2), k1)
        loss, chance = 2 * self.options.temperature * contrast, contrast.new_tensor(math.log(len(k1)))
        # The spread of z tells a collapse: 1 is uniform on the sphere, 0 collapsed.
        scalars = {"loss": loss.detach(), "health/projection_std": spread(F.normalize(z1.detach(), dim=1))}
        return StepOutput(loss, scalars | {"loss/info_nce": contrast.detach() / 2, "chance/info_nce": chance})

    def cross_entropy(self, q: Float[Tensor, "batch dim"], k: Float[Tensor, "all dim"]) -> Float[Tensor, ""]:
        logits = F.normalize(q.float(), dim=1) @ k.T / self.options.temperature
        return F.cross_entropy(logits, rank() * len(q) + torch.arange(len(q), device=q.device))

    def introduction(self) -> list[str]:
        keys = [key for key in ("hidden", "head_norm", "key_norm") if getattr(self.config.model, key) not in USUAL]
        names = ", ".join(f"model.{key}" for key in keys)
        return [f"not used by moco_v3: {names} (its projector and predictor have objective.hidden)"] if keys else []
