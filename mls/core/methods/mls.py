"""MLS (https://arxiv.org/abs/2308.03286): the dictionary's rows are classes, the k rows nearest to an image are its
positive pseudo-labels, and a multi-label loss pulls towards all of them at once, beside MoCo-v2's InfoNCE. The loss is
any of mls/core/losses that needs no more than labels: neighbours are +1, all other rows 0."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from mls.config import Config
from mls.core import losses, matching
from mls.core.dictionary import STORAGE
from mls.core.matching import Matches
from mls.core.method import Queries, Seen, StepOutput
from mls.core.methods.moco import MoCo
from mls.core.methods.positives import Positives
from mls.core.products import Mask, over_parts
from mls.data import Views
from mls.distributed import from_main, rank, world
from mls.errors import ConfigError
from mls.models import EncoderPair
from mls.streams import generator

SILENT = {"logits": -1e4, "cosines": -1.0}  # for a row that counts as a negative already told apart: its term is 0

RATED_FOR = 64 * 80  # labels of a downstream batch: a loss's lr_multiplier is chosen for these


class MLS(MoCo):
    def __init__(self, config: Config, pair: EncoderPair, image_labels: Tensor | None = None) -> None:
        super().__init__(config, pair, image_labels)
        backend = config.matching.backend
        self.matcher = matching.build("torch" if backend == matching.AUTO else backend)  # auto: `decide`
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
        if self.sharding.world > 1 and not loss.separable:
            raise ConfigError(
                f"objective.loss={objective.loss} looks at all rows of the dictionary at once, but "
                "dictionary.sharded=true keeps them on different processes: set it to false, or use objective.loss=an"
            )
        if self.sharding.world > 1 and objective.pseudo_labels != "matched":
            raise ConfigError(
                f"objective.pseudo_labels={objective.pseudo_labels} is a control for small runs: "
                "use dictionary.sharded=false"
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

    def decide(self, decided: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """matching.backend=auto: the back-end that rank 0 finds fastest for searches as large as this run's."""
        if self.config.matching.backend != matching.AUTO:
            return {}
        if not decided:
            measured = from_main(self.measured(device) if rank() == 0 else None)
            decided = {"backend": next(iter(measured)), "measured": matching.told(measured)}
        self.matcher = matching.build(decided["backend"])
        return decided

    def measured(self, device: torch.device) -> dict[str, float]:
        dictionary, objective = self.config.dictionary, self.config.objective
        if dictionary.own_rows == "exclude":
            return {"torch": math.nan}  # faiss would leave it to torch
        by_projection = objective.labels_from == "projection"
        width = self.config.model.projection if by_projection else self.pair.query.backbone.feature_dim
        batch = self.config.data.batch_size // self.config.engine.accumulate * self.sharding.world // world()
        rows = torch.randn(dictionary.size // self.sharding.world, width, device=device).to(STORAGE[dictionary.storage])
        return matching.seconds_of_each(torch.randn(batch, width, device=device), rows, min(objective.k, len(rows)))

    def set_progress(self, step: int, epoch: int, steps_per_epoch: int) -> None:
        """A loss's schedule counts from the first epoch in which the multi-label term acts."""
        warmup = self.config.objective.warmup_epochs
        self.warming_up = step <= warmup * steps_per_epoch
        self.loss.set_epoch(max(1, epoch - math.floor(warmup)))

    def beside_info_nce(
        self, queries: Queries, seen: Seen, views: Views, out: StepOutput | None
    ) -> Float[Tensor, ""] | None:
        if self.warming_up or len(self.dictionary) < self.config.objective.k:
            return self.silence()
        positives = self.pseudo_labels(queries, seen, views)
        by_projection = self.config.objective.classify_with == "projection"
        query, rows = (queries.all_z, seen.rows.projection) if by_projection else (queries.all_g, seen.rows.backbone)
        loss, cosines = self.multi_label(query, rows, positives, seen)
        if out is not None:
            own = positives.of_process(self.sharding, len(views.ids))
            out.matched_ids = self.dictionary.ids[own.slots[:, : self.config.objective.k]]
            out.scalars["loss/multi_label"] = loss.detach()
            if self.measuring:
                chance, _ = self.multi_label(torch.zeros_like(query), rows, positives, seen)
                out.scalars["chance/multi_label"] = chance.detach()
            for name, parameter in self.loss.named_parameters():  # hml's scale and margin
                out.scalars[f"loss/{name}"] = parameter.detach().clone()
            out.scalars["cosine/positives"] = cosines[0].sum() / own.counts().sum().clamp(min=1)
            out.scalars["cosine/rows"] = cosines[1].sum() / (len(views.ids) * len(self.dictionary))
        return loss

    def multi_label(
        self,
        query: Float[Tensor, "everyone dim"],
        rows: Float[Tensor, "here dim"],
        positives: Positives,
        seen: Seen,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "2 batch"]]:
        """The term for this process' queries, and their cosines summed over positives and over all rows. Whatever can
        be is worked out for a part of the rows at a time: neither the labels nor the products exist for all at once."""
        here = positives.here(self.sharding)

        def sums(cosines: Tensor, part: slice) -> Tensor:
            """[4, everyone]: entries summed over all rows and over the positives, and the same of the cosines."""
            labels, plain = here.labels(part), cosines.detach()
            entries = self.entries(cosines, labels, seen.exclude, part)
            pulls, near = torch.linalg.vecdot(entries, labels), torch.linalg.vecdot(plain, labels)
            return torch.stack([entries.sum(1), pulls, near, plain.sum(1)])

        if self.loss.elementwise:
            parts = torch.stack(over_parts(sums, query, rows, whole=not self.loss.separable))
            total, of_positives, *cosines = self.sharding.totals(parts.sum(0))
            own = positives.of_process(self.sharding, len(seen.counted))
            return self.reduced(total, of_positives, own.counts(), seen.counted), torch.stack(cosines).detach()
        everything = slice(0, len(rows))
        (cosines,) = over_parts(lambda products, _: products, query, rows, whole=True)
        labels = here.labels(everything)
        of_cosines = torch.stack([(cosines * labels).sum(1), cosines.sum(1)]).detach()
        return self.loss(self.values(cosines, seen.exclude, everything), labels), of_cosines

    def values(self, cosines: Tensor, exclude: Mask | None, part: slice) -> Tensor:
        """What the loss takes. A query's own rows, where they are excluded, neither pull nor push."""
        values = cosines / self.config.objective.temperature if self.loss.takes == "logits" else cosines
        return values if exclude is None else values.masked_fill(exclude[:, part], SILENT[self.loss.takes])

    def entries(self, cosines: Tensor, labels: Tensor, exclude: Mask | None, part: slice) -> Tensor:
        entries = self.loss(self.values(cosines, exclude, part), labels)
        return entries if exclude is None else entries.masked_fill(exclude[:, part], 0.0)

    def reduced(
        self,
        total: Float[Tensor, "batch"],
        of_positives: Float[Tensor, "batch"],
        positives: Int64[Tensor, "batch"],
        counted: Int64[Tensor, "batch"],
    ) -> Float[Tensor, ""]:
        """One number of each query's entries, summed over all rows and over its positives."""
        if self.config.objective.normalise == "mean":
            return total.sum() if self.reduction == "sum" else total.sum() / counted.sum()
        if self.config.objective.normalise == "positives":
            return (total / positives.clamp(min=1)).mean()
        pull = of_positives / positives.clamp(min=1)
        push = (total - of_positives) / (counted - positives).clamp(min=1)
        return (pull + push).mean()

    def silence(self) -> Float[Tensor, ""] | None:
        """The term of a step without labels. DDP waits for a gradient of every parameter, the loss's own included."""
        learnt = [parameter.sum() for parameter in self.loss.parameters()]
        return 0.0 * torch.stack(learnt).sum() if learnt else None

    @torch.no_grad()
    def pseudo_labels(self, queries: Queries, seen: Seen, views: Views) -> Positives:
        """The slots of each query's nearest rows; for everyone's queries where the dictionary is sharded."""
        objective, k = self.config.objective, self.config.objective.k
        if objective.pseudo_labels != "matched":
            return Positives.of(self._control(seen, views))

        def nearest(queries: Tensor, rows: Tensor) -> Positives:
            return Positives.of(self.sharding.topk(self.matcher, queries.detach(), rows, k, seen.exclude))

        if objective.labels_from == "backbone":
            return nearest(queries.all_g, seen.rows.backbone)
        if objective.labels_from == "projection":
            return nearest(queries.all_z, seen.rows.projection)
        by_backbone = nearest(queries.all_g, seen.rows.backbone)
        by_projection = nearest(queries.all_z, seen.rows.projection)
        both = objective.labels_from == "intersection"
        return by_backbone & by_projection if both else by_backbone | by_projection

    def _control(self, seen: Seen, views: Views) -> Matches:
        """Scores that are no method: chance, or the true labels with ties broken by chance."""
        stream = generator(self.config.run.seed, "control", self.dictionary.count, rank())
        ids = seen.rows.ids
        scores = 1e-3 * torch.rand(len(views.ids), len(ids), generator=stream).to(views.ids.device)
        if self.config.objective.pseudo_labels == "oracle":
            if self.image_labels is None:
                raise ConfigError("objective.pseudo_labels=oracle needs images with labels: this source has none")
            query = F.normalize(self.image_labels[views.ids].float(), dim=1)
            scores += query @ F.normalize(self.image_labels[ids].float(), dim=1).T
        if seen.exclude is not None:
            scores = scores.masked_fill(seen.exclude[:, :], -torch.inf)
        best = scores.topk(self.config.objective.k, dim=1)
        return Matches(best.indices, best.values)


class KnnMoCo(MLS):
    """The softmax over neighbours of Van Gansbeke et al. (https://arxiv.org/abs/2106.05967), MLS' "+kNN" baseline."""

    def build_loss(self) -> losses.Loss:
        if self.config.objective.normalise != "mean":
            raise ConfigError("objective.method=knn_moco has its own mean: use objective.normalise=mean")
        if self.sharding.world > 1:
            raise ConfigError("objective.method=knn_moco needs all rows at once: use dictionary.sharded=false")
        return losses.build("softmax", **self.config.objective.options)
