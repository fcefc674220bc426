"""DenseCL as somebody outside mls would write it: InfoNCE for whole crops and for each cell of the map. What it
computes is explained in mls/core/methods/densecl.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mls import methods
from mls.config import Config, ObjectiveConfig, positive
from mls.core.dictionary import Dictionary
from mls.core.health import collapse_measures
from mls.core.losses.contrastive import info_nce_of_logits
from mls.core.products import log_sum_exp
from mls.data import Views
from mls.distributed import gather
from mls.errors import ConfigError
from mls.methods import Method, StepOutput
from mls.models import Backbone, Encoder, EncoderPair, Precision, build_encoder
from mls.models.norm import KeyNorm
from mls.streams import derive, generator


class DenseEncoder(nn.Module):
    """Images to z, to the backbone's cells, to the cells' own projections d and to these pooled, all of unit length."""

    def __init__(self, encoder: Encoder, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        features = encoder.backbone.feature_dim
        self.dense_head = nn.Sequential(nn.Conv2d(features, features, 1), nn.ReLU(), nn.Conv2d(features, width, 1))

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        _, z, maps = self.encoder.spatial(images)
        cells = maps.flatten(2).transpose(1, 2)  # [batch, cells, features]
        dense = self.dense_head(maps).float().flatten(2).transpose(1, 2)  # [batch, cells, width]
        pooled = dense.mean(dim=1)
        return F.normalize(z, dim=1), F.normalize(cells, dim=2), F.normalize(dense, dim=2), F.normalize(pooled, dim=1)


@dataclass(frozen=True)
class Options(ObjectiveConfig):
    method: str = "outside_densecl"
    temperature: float = positive(0.2)
    dense_weight: float = 0.5  # the paper's lambda: the global term has the rest
    dense_projection: int = positive(128)


@methods.register("outside_densecl", Options)
class DenseCL(Method):
    def __init__(self, config: Config, precision: Precision = "fp32", image_labels: Tensor | None = None) -> None:
        super().__init__(config, precision, image_labels)
        if config.dictionary.sharded:
            raise ConfigError("objective.method=densecl asks every cell of every row: use dictionary.sharded=false")
        self.options = cast(Options, config.objective)
        encoder = build_encoder(config.model, config.run.seed, precision)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(config.run.seed, "init", "dense head"))
            self.pair = EncoderPair(DenseEncoder(encoder, self.options.dense_projection))
        self.key_norm = KeyNorm(config.model.key_norm, config.model.key_group)
        self.dictionary = Dictionary(
            config.dictionary.size,
            storage=config.dictionary.storage,
            projection=config.model.projection,
            dense=self.options.dense_projection,
        )

    @property
    def backbone(self) -> Backbone:
        return self.pair.query.encoder.backbone

    def forward(self, views: Views) -> StepOutput:
        temperature, share = self.options.temperature, self.options.dense_weight
        rows = self.dictionary.rows()
        z1, cells1, d1, _ = self.pair.query(views.images[0])
        z2, cells2, d2, pooled = self.encode_keys(views.images[1])

        negatives = log_sum_exp(z1, rows.projection, temperature)  # [batch]
        whole = info_nce_of_logits((z1 * z2).sum(1) / temperature, negatives)
        match = (cells1.detach() @ cells2.transpose(1, 2)).argmax(dim=2)  # [batch, cells]
        positive = d2.gather(1, match[:, :, None].expand_as(d1))  # [batch, cells, width]
        negatives = log_sum_exp(d1.flatten(0, 1), rows.dense, temperature)  # [batch · cells]
        dense = info_nce_of_logits((d1 * positive).sum(2).flatten() / temperature, negatives)

        loss = (1 - share) * whole + share * dense
        values = {"loss": loss, "loss/info_nce": whole, "loss/dense": dense}
        keys = gather([z2, pooled, views.ids, views.boxes[1]])
        named = dict(zip(("projection", "dense", "ids", "boxes"), keys, strict=True))
        return StepOutput(loss, {name: value.detach() for name, value in values.items()}, keys=named)

    @torch.no_grad()
    def encode_keys(self, images: Tensor) -> tuple[Tensor, ...]:
        stream = generator(self.config.run.seed, "key order", self.dictionary.count)
        return self.key_norm(self.pair.key, images, stream)

    def after_step(self, outputs: list[StepOutput]) -> None:
        self.pair.update(self.config.model.momentum)
        for out in outputs:
            self.dictionary.enqueue(**out.keys)

    def memories(self) -> Mapping[str, Dictionary]:
        return {"dictionary": self.dictionary}

    def introduction(self) -> list[str]:
        return [self.key_norm.note] if self.key_norm.note else []

    def measurements(self) -> dict[str, float]:
        return {"dictionary/fill": len(self.dictionary) / self.dictionary.capacity}

    def health(self) -> dict[str, float]:
        rows = self.dictionary.rows()
        return collapse_measures("projection", rows.projection) | collapse_measures("dense", rows.dense)
