"""What is no pretraining method but stands in its tables: pseudo-labels by chance or by true label, and the network
trained with the true labels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mls.config import Config, MLSOptions, SupervisedOptions
from mls.core.dictionary import Dictionary
from mls.core.matching import Matches
from mls.core.method import StepOutput
from mls.core.methods import register
from mls.core.methods.moco import MoCo
from mls.core.queried_rows import QueriedRows
from mls.data import Views
from mls.distributed import rank
from mls.errors import ConfigError
from mls.models import Precision
from mls.streams import generator, initialisation

Control = Callable[[QueriedRows, Int64[Tensor, "batch"], int], Matches]


def control(config: Config, dictionary: Dictionary, image_labels: Tensor | None) -> Control | None:
    """What gives the pseudo-labels of `objective.pseudo_labels=random` or `oracle`; None for a method's own."""
    assert isinstance(config.objective, MLSOptions)
    kind, share = config.objective.pseudo_labels, config.objective.oracle_share
    if kind == "matched":
        return None
    if dictionary.sharding.world > 1:
        raise ConfigError(f"objective.pseudo_labels={kind} is a control for small runs: use dictionary.sharded=false")

    def by_score(rows: QueriedRows, ids: Int64[Tensor, "batch"], k: int) -> Matches:
        stream = generator(config.run.seed, "control", dictionary.count, rank())
        scores = 1e-3 * torch.rand(len(ids), len(rows), generator=stream).to(ids.device)
        if kind == "oracle":  # the true labels, with ties broken by chance
            scores += label_cosines(ids, rows.ids, image_labels)
        if rows.exclude is not None:
            scores = scores.masked_fill(rows.exclude[:, :], -torch.inf)
        best = scores.topk(k, dim=1)
        if kind == "random" or share == 1:
            return Matches(best.indices, best.values)
        drawn = torch.rand(scores.shape, generator=stream).to(scores)
        others = drawn.masked_fill(scores.isneginf(), -torch.inf).scatter(1, best.indices, -torch.inf).topk(k, dim=1)
        by_label = (torch.rand(best.indices.shape, generator=stream) < share).to(ids.device)
        return Matches(
            torch.where(by_label, best.indices, others.indices), torch.where(by_label, best.values, others.values)
        )

    return by_score


def label_cosines(
    queries: Int64[Tensor, "batch"], rows: Int64[Tensor, "rows"], image_labels: Float[Tensor, "images classes"] | None
) -> Float[Tensor, "batch rows"]:
    if image_labels is None:
        raise ConfigError("objective.pseudo_labels=oracle needs images with labels: this source has none")
    return F.normalize(image_labels[queries].float(), dim=1) @ F.normalize(image_labels[rows].float(), dim=1).T


@register("supervised", SupervisedOptions)
class Supervised(MoCo):
    """The same network, views and engine trained with the true labels: the ceiling of a table."""

    def __init__(self, config: Config, precision: Precision = "fp32", image_labels: Tensor | None = None) -> None:
        super().__init__(config, precision, image_labels)
        if image_labels is None:
            raise ConfigError("objective.method=supervised needs images with labels: this source has none")
        self.image_labels = image_labels
        self.pair.query.head.requires_grad_(False)  # not used here; DDP wants a gradient of every trained parameter
        with initialisation(config.run.seed, "classifier"):
            self.classifier = nn.Linear(self.backbone.feature_dim, image_labels.shape[1])

    def forward(self, views: Views) -> StepOutput:
        keys, _ = self.encode_keys(views)  # the dictionary fills as in the other rows, so its health can be compared
        features, _ = self.pair.query(views.images[0])
        loss = F.binary_cross_entropy_with_logits(self.classifier(features), self.image_labels[views.ids])
        return StepOutput(loss=loss, keys=keys, scalars={"loss": loss.detach()}, query_ids=views.ids)
