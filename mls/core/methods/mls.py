"""MLS (https://arxiv.org/abs/2308.03286): the dictionary's rows are classes, the k rows nearest to an image are its
positive pseudo-labels, and a multi-label loss pulls towards all of them at once, beside MoCo-v2's InfoNCE. The loss is
any of mls/core/losses that needs no more than labels: neighbours are +1, all other rows 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from mls.config import Config, KnnMoCoOptions, MLSOptions
from mls.core import losses, matching
from mls.core.dictionary import STORAGE
from mls.core.method import MatchedRows, Memory, Nearest, OwnRate, StepOutput
from mls.core.methods import register
from mls.core.methods.controls import control
from mls.core.methods.moco import MoCo, Query
from mls.core.multi_label import MultiLabelTerm, build_loss
from mls.core.positives import Positives
from mls.core.queried_rows import QueriedRows
from mls.core.region_labels import RegionLabels
from mls.data import Source, Views
from mls.distributed import rank, world
from mls.errors import ConfigError
from mls.models import Precision
from mls.streams import generator


@register("mls", MLSOptions)
class MLS(MoCo):
    def __init__(self, config: Config, precision: Precision = "fp32", image_labels: Tensor | None = None) -> None:
        super().__init__(config, precision, image_labels)
        self.options: MLSOptions = cast(MLSOptions, config.objective)
        self.label_windows = self.options.label_windows
        self.info_nce_weight = self.options.info_nce_weight
        self.regions = RegionLabels(config, precision) if self.options.labels_from == "regions" else None
        self.control = control(config, self.dictionary, image_labels)  # pseudo-labels that are no method, or None
        self.matcher = matching.build("torch")  # `decide` puts the run's own in its place
        self.loss = self.build_loss()
        self.multi_label = MultiLabelTerm(self.loss, self.options)
        self.decided: dict[str, Any] = {}
        self.warming_up = False  # InfoNCE alone; `set_progress` says so

    def beside_info_nce(
        self, query: Query, rows: QueriedRows, views: Views, out: StepOutput | None
    ) -> Float[Tensor, ""] | None:
        if self.warming_up or len(rows) < self.options.k:
            return self.zero_of_loss_parameters()
        positives = self.pseudo_labels(query, rows, views)
        z1 = getattr(query, self.options.classify_with)
        loss, cosines = self.multi_label(z1, rows, positives)
        if out is not None:
            out.matched_ids = positives.images(rows.ids)[:, : self.options.k]
            out.scalars["loss/multi_label"] = loss.detach()
            out.measure = lambda: self.levels_of_chance(z1.detach(), rows, positives, views)
            for name, parameter in self.loss.named_parameters():  # hml's scale and margin
                out.scalars[f"loss/{name}"] = parameter.detach().clone()
            out.scalars |= cosines
        return self.options.weight * loss

    @torch.no_grad()
    def levels_of_chance(
        self, z1: Float[Tensor, "batch dim"], rows: QueriedRows, positives: Positives, views: Views
    ) -> dict[str, Float[Tensor, ""]]:
        """The multi-label loss of a network that tells nothing apart, and of this one were as many random rows its
        positives."""
        own = rows.exclude is not None
        drawn = generator(self.config.run.seed, "random rows", self.dictionary.count, rank())
        random = Positives.random(positives.counts(), rows.ids, views.ids if own else None, drawn)
        return {
            "chance/multi_label": self.multi_label(torch.zeros_like(z1), rows, positives)[0],
            "loss/multi_label_random_rows": self.multi_label(z1, rows, random)[0],
        }

    @torch.no_grad()
    def pseudo_labels(self, query: Query, rows: QueriedRows, views: Views) -> Positives:
        """The k rows nearest to each query are its positives."""
        if self.regions is not None:
            own = Positives.of(self.regions.among(views.ids, rows.ids), self.options.regions.soft)
            if self.control is None:
                return own
            most = min(own.slots.shape[1], len(rows))
            return Positives.of(self.control(rows, views.ids, most)).first(own.counts())  # as many
        if self.control is not None:
            return Positives.of(self.control(rows, views.ids, self.options.k))
        labels_from = self.options.labels_from

        def nearest(memory: str) -> Positives:
            return Positives.of(rows.topk(memory, getattr(query, memory), self.options.k, self.matcher))

        if labels_from == "union":
            return nearest("backbone") | nearest("projection")
        if labels_from == "intersection":
            return nearest("backbone") & nearest("projection")
        return nearest(labels_from)

    # ------------------------------------------------------------------------------------------ before the first step

    def refuse(self, source: Source) -> None:
        if self.regions is not None and self.regions.file is not None:
            self.regions.check(source)

    def build_loss(self) -> losses.Loss:
        return build_loss(self.options, sharded=self.dictionary.sharding.world > 1)

    def own_rates(self) -> list[OwnRate]:
        config = self.config
        images = config.data.batch_size // (world() * config.engine.accumulate)
        entries, adaptive = images * config.dictionary.size, config.optim.name == "adamw"
        return [OwnRate(list(self.loss.parameters()), losses.own_rate(self.loss, entries, adaptive))]

    def decide(self, decided: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """matching.backend=auto: measured for searches as large as this run's."""
        only_torch = self.config.dictionary.own_rows == "exclude"  # faiss would leave it to torch
        search = None if only_torch else lambda: self.example_search(device)
        self.matcher, decided = matching.settle(self.config.matching.backend, decided, search)
        self.decided = decided
        return decided

    def example_search(self, device: torch.device) -> tuple[Tensor, Tensor, int]:
        config, held = self.config, self.dictionary.capacity // self.dictionary.sharding.world
        by_projection = self.options.labels_from == "projection"
        width = config.model.projection if by_projection else self.backbone.feature_dim
        batch = config.data.batch_size // config.engine.accumulate * self.dictionary.sharding.world // world()
        rows = torch.randn(held, width, device=device).to(STORAGE[config.dictionary.storage])
        return torch.randn(batch, width, device=device), rows, min(self.options.k, held)

    def set_progress(self, step: int, epoch: int, steps_per_epoch: int) -> None:
        """A loss's schedule counts from the first epoch in which the multi-label term acts."""
        warmup = self.options.warmup_epochs
        self.step, self.steps_per_epoch = step, steps_per_epoch
        self.warming_up = step <= warmup * steps_per_epoch
        self.loss.set_epoch(max(1, epoch - math.floor(warmup)))

    def refresh(self, source: Source, tell: Callable[[str, int, int], None]) -> dict[str, float]:
        if self.regions is None:
            return {}
        return self.regions.refresh(self.pair.key.backbone, source, self.step, self.steps_per_epoch, tell)

    def zero_of_loss_parameters(self) -> Float[Tensor, ""] | None:
        """The term of a step without labels. DDP waits for a gradient of every parameter, the loss's own included."""
        learnt = [parameter.sum() for parameter in self.loss.parameters()]
        return 0.0 * torch.stack(learnt).sum() if learnt else None

    # ----------------------------------------------------------------------------------------------- logging and saving

    def memories(self) -> Mapping[str, Memory]:
        own = {} if self.regions is None else {"neighbours": self.regions}
        return {**super().memories(), **own}

    def introduction(self) -> list[str]:
        sentences = super().introduction()
        if self.decided:
            measured = ", ".join(self.decided["measured"])
            sentences.append(f"matching with {self.decided['backend']} (a search takes {measured})")
        if self.step > 1:
            return sentences
        filled = math.ceil(self.options.k / self.config.data.batch_size)  # steps until the dictionary holds k rows
        first = 1 + max(filled, int(self.options.warmup_epochs * self.steps_per_epoch))
        alone = "InfoNCE alone" if self.info_nce_weight else "nothing is learnt"
        return [*sentences, f"{alone} until the multi-label term joins at step {first}"]

    @torch.no_grad()
    def matches(self, views: Views, most: int) -> MatchedRows | None:
        """First by the memory that labels."""
        if len(self.dictionary) == 0:
            return None
        most = min(most, self.options.k)
        matched = self.matched_rows(views, most)
        if self.options.labels_from == "projection":
            nearest = dict(reversed(matched.nearest.items()))
        elif self.regions is None or self.regions.lists is None:
            return matched
        else:
            found = self.regions.among(views.ids, matched.ids)
            slots, scores = found.indices[:, :most], found.scores[:, :most]
            alike = self.regions.lists.most_alike(views.ids, matched.ids[slots])
            nearest = {"regions": Nearest(slots, scores, scores.new_empty(0), regions=alike), **matched.nearest}
        return replace(matched, nearest=nearest)


@register("knn_moco", KnnMoCoOptions)
class KnnMoCo(MLS):
    """The softmax over neighbours of Van Gansbeke et al. (https://arxiv.org/abs/2106.05967), MLS' "+kNN" baseline."""

    def build_loss(self) -> losses.Loss:
        if self.options.normalise != "mean":
            raise ConfigError("objective.method=knn_moco has its own mean: use objective.normalise=mean")
        if self.options.labels_from == "regions" and self.options.regions.soft:
            raise ConfigError("objective.method=knn_moco weighs its positives alike: use objective.regions.soft=0")
        if self.dictionary.sharding.world > 1:
            raise ConfigError("objective.method=knn_moco needs all rows at once: use dictionary.sharded=false")
        return losses.build("softmax", **self.options.options)
