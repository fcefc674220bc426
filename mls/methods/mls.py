"""MLS (https://arxiv.org/abs/2308.03286): the dictionary's rows are classes, the k rows nearest to an image are its
positive pseudo-labels, and a multi-label loss pulls towards all of them at once, beside MoCo-v2's InfoNCE. The loss is
any of mls/losses that needs no more than labels: neighbours are +1, all other rows 0."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mls import losses, matching
from mls.config import Config
from mls.data import Views
from mls.dictionary import Rows
from mls.distributed import rank, world
from mls.errors import ConfigError
from mls.methods.base import StepOutput
from mls.methods.moco import MoCo
from mls.models import EncoderPair
from mls.streams import generator

SILENT = {"logits": -1e4, "cosines": -1.0}  # for a row that counts as a negative already told apart: its term is 0

RATED_FOR = 64 * 80  # labels of a downstream batch: a loss's lr_multiplier is chosen for these


class MLS(MoCo):
    def __init__(self, config: Config, pair: EncoderPair, image_labels: Tensor | None = None) -> None:
        super().__init__(config, pair, image_labels)
        self.matcher = matching.build(config.matching.backend)
        self.loss = self.build_loss()
        self.reduction = self.loss.reduction
        if self.reduction == "none":
            raise ConfigError("objective.options.reduction=none gives no single number to train on: use mean or sum")
        if self.loss.elementwise:
            self.loss.reduction = "none"  # entries are reduced in `multi_label`, which knows those to leave out
        self.loss.lr_multiplier = self.own_rate()
        self.warming_up = False  # InfoNCE alone; `set_progress` says so

    def build_loss(self) -> losses.Loss:
        objective = self.config.objective
        options = dict(objective.options)
        if objective.loss == "epr":  # an image has k neighbours here; the loss's own default is a photo's objects
            options.setdefault("expected_positives", float(objective.k))
        loss = losses.build(objective.loss, **options)
        if loss.needs_index:
            raise ConfigError(
                f"objective.loss={objective.loss} keeps estimates of every image's labels, but here the labels are the "
                "dictionary's rows, which change at every step: use objective.loss=em or an"
            )
        if objective.normalise != "mean" and not loss.elementwise:
            raise ConfigError(
                f"objective.normalise={objective.normalise} weighs single entries, "
                f"objective.loss={objective.loss} has none: use objective.normalise=mean"
            )
        return loss

    def own_rate(self) -> float:
        """Of what the loss learns itself, times the network's. hml's scale and margin are pulled by a sum over all
        entries, and a dictionary has far more than a downstream batch; AdamW takes no account of a gradient's size."""
        config = self.config
        if config.optim.name == "adamw":
            return 1.0
        batch = config.data.batch_size // (world() * config.engine.accumulate)
        return self.loss.lr_multiplier * RATED_FOR / (batch * config.dictionary.size)

    def set_progress(self, step: int, epoch: int, steps_per_epoch: int) -> None:
        """A loss's schedule counts from the first epoch in which the multi-label term acts."""
        warmup = self.config.objective.warmup_epochs
        self.warming_up = step <= warmup * steps_per_epoch
        self.loss.set_epoch(max(1, epoch - math.floor(warmup)))

    def beside_info_nce(
        self,
        g1: Float[Tensor, "batch features"],
        z1: Float[Tensor, "batch projection"],
        rows: Rows,
        own_rows: Bool[Tensor, "batch rows"] | None,
        views: Views,
        out: StepOutput | None,
    ) -> Float[Tensor, ""] | None:
        own = 0 if own_rows is None else int(own_rows.sum(1).max())
        if self.warming_up or len(rows.ids) - own < self.config.objective.k:
            return self.silence()
        labels, matches = self.pseudo_labels(g1.detach(), z1.detach(), rows, own_rows, views)
        by_projection = self.config.objective.classify_with == "projection"
        cosines = z1 @ rows.projection.T if by_projection else g1 @ rows.backbone.T  # [batch, rows]
        loss = self.multi_label(cosines, labels, own_rows)
        if out is not None:
            positive = labels > 0
            out.matched_ids = rows.ids[matches]
            out.scalars["loss/multi_label"] = loss.detach()
            if self.measuring:
                chance = self.multi_label(torch.zeros_like(cosines), labels, own_rows)
                out.scalars["chance/multi_label"] = chance.detach()
            for name, parameter in self.loss.named_parameters():  # hml's scale and margin
                out.scalars[f"loss/{name}"] = parameter.detach().clone()
            out.scalars["cosine/positives"] = (cosines.detach() * positive).sum() / positive.sum().clamp(min=1)
            out.scalars["cosine/rows"] = cosines.detach().mean()
        return loss

    def multi_label(
        self,
        cosines: Float[Tensor, "batch rows"],
        labels: Float[Tensor, "batch rows"],
        own_rows: Bool[Tensor, "batch rows"] | None,
    ) -> Float[Tensor, ""]:
        """A query's own rows, where they are excluded, neither pull nor push nor count in a mean."""
        objective, takes = self.config.objective, self.loss.takes
        values = cosines / objective.temperature if takes == "logits" else cosines
        if own_rows is not None:
            values = values.masked_fill(own_rows, SILENT[takes])
        if not self.loss.elementwise:
            return self.loss(values, labels)
        entries = self.loss(values, labels)  # [batch, rows]
        counted = torch.full((len(labels),), labels.shape[1], device=labels.device)
        if own_rows is not None:
            entries, counted = entries.masked_fill(own_rows, 0.0), counted - own_rows.sum(1)
        if objective.normalise == "mean":
            return entries.sum() if self.reduction == "sum" else entries.sum() / counted.sum()
        positive = labels > 0
        count = positive.sum(1)
        if objective.normalise == "positives":
            return (entries.sum(1) / count.clamp(min=1)).mean()
        pull = (entries * positive).sum(1) / count.clamp(min=1)
        push = (entries * ~positive).sum(1) / (counted - count).clamp(min=1)
        return (pull + push).mean()

    def silence(self) -> Float[Tensor, ""] | None:
        """The term of a step without labels. DDP waits for a gradient of every parameter, the loss's own included."""
        learnt = [parameter.sum() for parameter in self.loss.parameters()]
        return 0.0 * torch.stack(learnt).sum() if learnt else None

    @torch.no_grad()
    def pseudo_labels(
        self,
        g1: Float[Tensor, "batch features"],
        z1: Float[Tensor, "batch projection"],
        rows: Rows,
        own_rows: Bool[Tensor, "batch rows"] | None,
        views: Views,
    ) -> tuple[Float[Tensor, "batch rows"], Int64[Tensor, "batch k"]]:
        """+1 for a query's nearest rows, 0 for the rest; and the matches they came from."""
        objective, k = self.config.objective, self.config.objective.k
        if objective.pseudo_labels != "matched":
            matches = self._control(rows, own_rows, views).topk(k, dim=1).indices
            return _as_labels(matches, len(rows.ids)), matches
        by_backbone = by_projection = None
        if objective.labels_from != "projection":
            by_backbone = self.matcher.topk(g1, rows.backbone, k, exclude=own_rows).indices
        if objective.labels_from != "backbone":
            by_projection = self.matcher.topk(z1, rows.projection, k, exclude=own_rows).indices
        if by_backbone is None or by_projection is None:
            matches = by_projection if by_backbone is None else by_backbone
            assert matches is not None
            return _as_labels(matches, len(rows.ids)), matches
        first, second = _as_labels(by_backbone, len(rows.ids)), _as_labels(by_projection, len(rows.ids))
        labels = torch.maximum(first, second) if objective.labels_from == "union" else first * second
        return labels, by_backbone

    def _control(self, rows: Rows, own_rows: Tensor | None, views: Views) -> Float[Tensor, "batch rows"]:
        """Scores that are no method: chance, or the true labels with ties broken by chance."""
        stream = generator(self.config.run.seed, "control", self.dictionary.count, rank())
        chance = torch.rand(len(views.ids), len(rows.ids), generator=stream).to(views.ids.device)
        if own_rows is not None:
            chance = chance.masked_fill(own_rows, -2)
        if self.config.objective.pseudo_labels == "random":
            return chance
        if self.image_labels is None:
            raise ConfigError("objective.pseudo_labels=oracle needs images with labels: this source has none")
        query = F.normalize(self.image_labels[views.ids].float(), dim=1)
        row = F.normalize(self.image_labels[rows.ids].float(), dim=1)
        return query @ row.T + 1e-3 * chance


class KnnMoCo(MLS):
    """The softmax over neighbours of Van Gansbeke et al. (https://arxiv.org/abs/2106.05967), MLS' "+kNN" baseline."""

    def build_loss(self) -> losses.Loss:
        if self.config.objective.normalise != "mean":
            raise ConfigError("objective.method=knn_moco has its own mean: use objective.normalise=mean")
        return losses.build("softmax", **self.config.objective.options)


def _as_labels(matches: Int64[Tensor, "batch k"], rows: int) -> Float[Tensor, "batch rows"]:
    return torch.zeros(len(matches), rows, device=matches.device).scatter_(1, matches, 1.0)
