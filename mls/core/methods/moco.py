"""MoCo-v2 (https://arxiv.org/abs/2003.04297): each query is told from the dictionary's rows by its own key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from mls.config import Config, MoCoOptions
from mls.core import matching
from mls.core.dictionary import Dictionary
from mls.core.health import collapse_measures
from mls.core.losses.contrastive import info_nce_of_logits
from mls.core.method import MatchedRows, Memory, MomentumMethod, Nearest, StepOutput
from mls.core.methods import register
from mls.core.products import OwnRows, log_sum_exp
from mls.core.queried_rows import QueriedRows
from mls.core.sharding import Sharding
from mls.core.windows import WindowTerm
from mls.data import ViewPlan, Views
from mls.distributed import gather, rank, world
from mls.models import Precision, build_pair
from mls.models.norm import KeyNorm, share_statistics
from mls.streams import generator

MEMORIES = {"features": "backbone", "projections": "projection"}  # as people call what is nearest -> the memory
MATCHES = 10  # rows that are looked at where a method takes no positives
ALL_SCORES = 1 << 16  # of queries with rows, that those of matches are compared with: the 99th in 100 to 0.04


class Query(NamedTuple):
    """One crop of each image, embedded with gradient: g1 and z1 of unit length, by the name of the memory they meet."""

    backbone: Float[Tensor, "batch features"]
    projection: Float[Tensor, "batch projection"]


@dataclass
class Keys:
    """What a step adds to the dictionary: g2 and z2 of all processes' images, and where they come from."""

    backbone: Float[Tensor, "batch features"]
    projection: Float[Tensor, "batch projection"]
    ids: Int64[Tensor, "batch"]
    boxes: Float[Tensor, "batch 4"]


@register("moco_v2", MoCoOptions)
class MoCo(MomentumMethod):
    info_nce_weight = 1.0  # MLS lets it be chosen
    term = "multi_label"  # the part of the loss beside InfoNCE, where a method has one
    label_windows = False  # are windows queries of that term, too?

    def __init__(self, config: Config, precision: Precision = "fp32", image_labels: Tensor | None = None) -> None:
        super().__init__(config, precision, image_labels)
        self.options = cast(MoCoOptions, config.objective)
        self.pair = build_pair(config.model, config.run.seed, precision)
        self.key_norm = KeyNorm(config.model.key_norm, config.model.key_group, self.pair.key)
        windows = self.options.windows
        model, width = config.model, self.backbone.feature_dim
        self.windows = WindowTerm(windows, model, width, config.run.seed) if windows.count else None
        if self.windows is not None and self.key_norm.mode == "sync":
            share_statistics(self.windows.heads.key)
        self.dictionary = Dictionary(
            config.dictionary.size,
            storage=config.dictionary.storage,
            sharding=Sharding.over_processes(config.dictionary.sharded),
            backbone=self.backbone.feature_dim,
            projection=config.model.projection,
        )
        images = config.data.batch_size // config.engine.accumulate // self.ordered_together()
        self.orders: dict[tuple[str, int], Tensor] = {}
        for purpose, count in (("key order", images), ("window order", images * windows.count)):
            self.orders[purpose, count] = self.drawn(purpose, count)

    def views(self) -> ViewPlan:
        return super().views() if self.windows is None else self.windows.added_to(super().views())

    def forward(self, views: Views) -> StepOutput:
        temperature = self.options.temperature
        rows = QueriedRows(
            self.dictionary, views.ids, self.config.dictionary.own_rows == "exclude"
        )  # one state for all
        keys, own = self.encode_keys(views)
        z2 = keys.projection[own]

        small_crops = views.images[2 : len(views.images) - 2 * self.options.windows.count]
        crops = [views.images[0], *small_crops]  # small crops are queries too
        out = StepOutput(z2.new_zeros(()), keys=keys, query_ids=views.ids, candidate_ids=rows.ids)
        for number, images in enumerate(crops):
            query = Query(*(F.normalize(output, dim=1) for output in self.pair.query(images)))
            own_key = (query.projection * z2).sum(dim=1)  # [batch]
            negatives = self.negatives(query, rows, keys, views)  # [batch]
            contrast = info_nce_of_logits(own_key / temperature, negatives)
            term = self.beside_info_nce(query, rows, views, out if number == 0 else None)
            weighted = self.info_nce_weight * contrast
            out.loss = out.loss + (weighted if term is None else weighted + term) / len(crops)
            if number == 0:
                out.outputs = [query.projection, query.backbone]
                out.parts |= {"info_nce": weighted} | ({} if term is None else {self.term: term})
                out.scalars["loss/info_nce"] = contrast.detach()
                out.scalars["chance/info_nce"] = self.chance(rows, keys, views)
                out.scalars["cosine/own_key"] = own_key.mean().detach()
        if self.windows is not None:
            self.add_windows(self.windows, rows, views, out)
        out.scalars["loss"] = out.loss.detach()
        return out

    def add_windows(self, term: WindowTerm, rows: QueriedRows, views: Views, out: StepOutput) -> None:
        count = self.options.windows.count
        order = self.order("window order", count * len(views.ids))
        loss, features, u1, chance = term(self.pair, self.key_norm, views, order)
        out.loss = out.loss + self.options.windows.weight * loss
        out.outputs.append(u1)
        out.parts["windows"] = self.options.windows.weight * loss
        out.scalars |= {"loss/windows": loss.detach(), "chance/windows": loss.new_tensor(chance)}
        if not self.label_windows:
            return
        for g1, z1 in zip(features.chunk(count), self.pair.query.projected(features).chunk(count), strict=True):
            labelled = self.beside_info_nce(Query(F.normalize(g1, dim=1), F.normalize(z1, dim=1)), rows, views, None)
            if labelled is not None:
                out.loss = out.loss + labelled / count

    def negatives(self, query: Query, rows: QueriedRows, keys: Keys, views: Views) -> Float[Tensor, "batch"]:
        """The log-sum-exp of the logits of each query's negatives."""
        temperature = self.options.temperature
        others = rows.logsumexp("projection", query.projection, temperature)
        if self.options.in_batch_negatives:
            own_keys = OwnRows(views.ids, keys.ids)  # its own key is the positive, never a negative
            others = torch.logaddexp(others, log_sum_exp(query.projection, keys.projection, temperature, own_keys))
        return others

    def chance(self, rows: QueriedRows, keys: Keys, views: Views) -> Float[Tensor, ""]:
        """InfoNCE of a network that cannot tell anything from anything."""
        count = 1.0 + rows.counts
        if self.options.in_batch_negatives:
            count = count + len(keys.ids) - OwnRows(views.ids, keys.ids).counts()
        return count.log().mean()

    def beside_info_nce(
        self, query: Query, rows: QueriedRows, views: Views, out: StepOutput | None
    ) -> Float[Tensor, ""] | None:
        """The term beside InfoNCE; MoCo-v2 has none. `out` receives what the log wants (first query crop only)."""
        return None

    @torch.no_grad()
    def encode_keys(self, views: Views) -> tuple[Keys, slice]:
        """The keys of all processes, and which of them are this process' own."""
        g2, z2 = self.key_norm(self.pair.key, views.images[1], self.order("key order", len(views.ids)))
        g2, z2 = F.normalize(g2, dim=1), F.normalize(z2, dim=1)
        keys = Keys(*gather([g2, z2, views.ids, views.boxes[1]]))
        return keys, slice(rank() * len(z2), (rank() + 1) * len(z2))

    def order(self, purpose: str, images: int) -> Int64[Tensor, "all"]:
        """Of the images that the key encoder sees in one order in this step. The same on every process, and a resume
        goes on where it was: all know how many enqueues there were. Kept: torch.compile can follow no generator."""
        key = purpose, images * world() // self.ordered_together()
        if key not in self.orders:
            self.orders[key] = self.drawn(*key)
        return self.orders[key]

    def ordered_together(self) -> int:
        """Processes each of which puts its own images in order; 1: those of all are exchanged."""
        return 1 if self.key_norm.mode == "shuffle" else world()

    def drawn(self, purpose: str, count: int) -> Int64[Tensor, "all"]:
        return torch.randperm(count, generator=generator(self.config.run.seed, purpose, self.dictionary.count))

    def draw_orders(self) -> None:
        self.orders = {key: self.drawn(*key) for key in self.orders}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self.draw_orders()

    @torch.no_grad()
    def after_step(self, outputs: list[StepOutput]) -> None:
        super().after_step(outputs)
        if self.windows is not None:
            self.windows.heads.update(self.momentum)
        for out in outputs:
            self.dictionary.enqueue(**vars(out.keys))
        self.draw_orders()

    # ----------------------------------------------------------------------------------------------- logging and saving

    def memories(self) -> Mapping[str, Memory]:
        return {"dictionary": self.dictionary}

    @property
    def saves_together(self) -> bool:
        return self.dictionary.sharding.world > 1

    def introduction(self) -> list[str]:
        return [self.key_norm.note] if self.key_norm.note else []

    def measurements(self) -> dict[str, float]:
        return {"dictionary/fill": len(self.dictionary) / self.dictionary.capacity}

    def health(self) -> dict[str, float]:
        rows = self.dictionary.rows()
        return collapse_measures("backbone", rows.backbone) | collapse_measures("projection", rows.projection)

    @torch.no_grad()
    def matches(self, views: Views, most: int) -> MatchedRows | None:
        return None if len(self.dictionary) == 0 else self.matched_rows(views, min(most, MATCHES))

    def matched_rows(self, views: Views, count: int) -> MatchedRows:
        """By both memories."""
        dictionary = self.dictionary
        query = Query(*(F.normalize(output, dim=1) for output in self.pair.query(views.images[0])))
        nearest = {name: self.nearest(memory, query, views, count) for name, memory in MEMORIES.items()}
        ages = dictionary.enqueues_since // self.config.engine.accumulate  # each micro-batch is an enqueue
        return MatchedRows(dictionary.ids, dictionary.boxes, ages, nearest)

    def nearest(self, memory: str, query: Query, views: Views, count: int) -> Nearest:
        matcher, asking, count = matching.build("torch"), getattr(query, memory), min(count, len(self.dictionary))
        others, every = (QueriedRows(self.dictionary, views.ids, exclude_own) for exclude_own in (True, False))
        found, own = others.topk(memory, asking, count, matcher), 0.0
        if self.config.dictionary.own_rows != "exclude":
            slots = every.topk(memory, asking, count, matcher).indices
            own = float((every.ids[slots] == views.ids[:, None]).float().mean())
        return Nearest(found.indices, found.scores, others.scores(memory, asking, ALL_SCORES), own)
