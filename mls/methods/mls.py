"""MLS (https://arxiv.org/abs/2308.03286): the dictionary's rows are classes, the k rows nearest to an image are its
positive pseudo-labels, and a multi-label loss pulls towards all of them at once, beside MoCo-v2's InfoNCE."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mls import losses, matching
from mls.config import Config
from mls.data import Views
from mls.dictionary import Rows
from mls.distributed import rank
from mls.errors import ConfigError
from mls.methods.base import StepOutput
from mls.methods.moco import MoCo
from mls.models import EncoderPair
from mls.streams import generator

SILENT = -1e4  # a logit that neither pulls nor pushes: softplus and exp of it are 0


class MLS(MoCo):
    def __init__(self, config: Config, pair: EncoderPair, image_labels: Tensor | None = None) -> None:
        super().__init__(config, pair, image_labels)
        self.matcher = matching.build(config.matching.backend)
        self.loss = self.build_loss()
        self.warming_up = False  # InfoNCE alone; the trainer sets it from the step

    def build_loss(self) -> torch.nn.Module:
        objective = self.config.objective
        options = dict(objective.options)
        if objective.normalise != "mean":
            options["reduction"] = "none"
        loss = losses.build(objective.loss, **options)
        if objective.normalise != "mean" and not loss.elementwise:
            raise ConfigError(
                f"objective.normalise={objective.normalise} weighs single entries, "
                f"objective.loss={objective.loss} has none: use objective.normalise=mean"
            )
        return loss

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
            return None
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
            out.scalars["cosine/positives"] = (cosines.detach() * positive).sum() / positive.sum().clamp(min=1)
            out.scalars["cosine/rows"] = cosines.detach().mean()
        return loss

    def multi_label(
        self,
        cosines: Float[Tensor, "batch rows"],
        labels: Float[Tensor, "batch rows"],
        own_rows: Bool[Tensor, "batch rows"] | None,
    ) -> Float[Tensor, ""]:
        logits = cosines / self.config.objective.temperature if self.loss.takes == "logits" else cosines
        if own_rows is not None:
            logits = logits.masked_fill(own_rows, SILENT if self.loss.takes == "logits" else 0.0)
        if self.config.objective.normalise == "mean":
            return self.loss(logits, labels)
        entries = self.loss(logits, labels)  # [batch, rows]
        positive = labels > 0
        count = positive.sum(1).clamp(min=1)
        if self.config.objective.normalise == "positives":
            return (entries.sum(1) / count).mean()
        pull = (entries * positive).sum(1) / count
        push = (entries * ~positive).sum(1) / (~positive).sum(1).clamp(min=1)
        return (pull + push).mean()

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

    def build_loss(self) -> torch.nn.Module:
        if self.config.objective.normalise != "mean":
            raise ConfigError("objective.method=knn_moco has its own mean: use objective.normalise=mean")
        return losses.build("softmax", **self.config.objective.options)


def _as_labels(matches: Int64[Tensor, "batch k"], rows: int) -> Float[Tensor, "batch rows"]:
    return torch.zeros(len(matches), rows, device=matches.device).scatter_(1, matches, 1.0)
