"""MoCo-v2 (https://arxiv.org/abs/2003.04297): each query is told from the dictionary's rows by its own key."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mls.config import Config
from mls.core.dictionary import Dictionary
from mls.core.losses.contrastive import told_apart
from mls.core.method import Keys, Method, Queries, Seen, StepOutput
from mls.core.products import OwnRows, log_sum_exp
from mls.core.sharding import Sharding
from mls.data import Views
from mls.distributed import gather, rank
from mls.models import EncoderPair
from mls.models.norm import KeyNorm, share_statistics
from mls.streams import generator


class MoCo(Method):
    def __init__(self, config: Config, pair: EncoderPair, image_labels: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self.pair = pair
        self.measuring = True  # also work out what only the log wants; the trainer sets it from the step
        self.image_labels = image_labels  # controls and monitoring only; no method learns from them
        self.key_norm = KeyNorm(config.model.key_norm, config.model.key_group)
        if self.key_norm.mode == "sync":
            share_statistics(pair.key)
        # Not a module: as a buffer DDP would broadcast it at every forward.
        self.sharding = Sharding.over_processes(config.dictionary.sharded)
        self.dictionary = Dictionary(
            config.dictionary.size,
            backbone=pair.query.backbone.feature_dim,
            projection=config.model.projection,
            storage=config.dictionary.storage,
            sharding=self.sharding,
        )

    def forward(self, views: Views) -> StepOutput:
        objective = self.config.objective
        keys, own = self.encode_keys(views)
        seen = self.look(views, keys)  # one state for everything below
        z2 = keys.projection[own]

        crops = [views.images[0], *views.images[2:]]  # small crops are queries too
        out = StepOutput(loss=z2.new_zeros(()), keys=keys, query_ids=views.ids)
        for number, images in enumerate(crops):
            queries = self.embed(images)
            own_key = (queries.z * z2).sum(dim=1)  # [batch]
            contrast = told_apart(own_key / objective.temperature, self.negatives(queries, seen, keys, views))
            part = self.beside_info_nce(queries, seen, views, out if number == 0 else None)
            total = contrast if part is None else contrast + objective.weight * part
            out.loss = out.loss + total / len(crops)
            if number == 0:
                out.outputs = [queries.z, queries.g]
                out.parts["info_nce"] = contrast
                if part is not None:
                    out.parts["multi_label"] = objective.weight * part
                out.scalars["loss/info_nce"] = contrast.detach()
                out.scalars["chance/info_nce"] = self.chance(seen, keys, views)
                out.scalars["cosine/own_key"] = own_key.mean().detach()
        out.scalars["loss"] = out.loss.detach()
        return out

    def embed(self, images: Float[Tensor, "batch 3 height width"]) -> Queries:
        g1, z1 = self.pair.query(images)
        g1, z1 = F.normalize(g1, dim=1), F.normalize(z1, dim=1)
        return Queries(g1, z1, *self.sharding.everyones([g1, z1]))

    def look(self, views: Views, keys: Keys) -> Seen:
        rows, slots = self.dictionary.rows(), self.dictionary.ids
        counted = torch.full_like(views.ids, len(slots))
        if self.config.dictionary.own_rows == "keep":
            return Seen(rows, None, counted)
        asked_for = keys.ids if self.sharding.world > 1 else views.ids
        return Seen(rows, OwnRows(asked_for, rows.ids), counted - OwnRows(views.ids, slots).counts())

    def negatives(self, queries: Queries, seen: Seen, keys: Keys, views: Views) -> Float[Tensor, "batch"]:
        """The log-sum-exp of the logits of each query's negatives."""
        temperature = self.config.objective.temperature
        others = log_sum_exp(queries.all_z, seen.rows.projection, temperature, seen.exclude)
        others = self.sharding.log_totals(others)
        if self.config.objective.in_batch_negatives:
            own_keys = OwnRows(views.ids, keys.ids)  # its own key is the positive, never a negative
            others = torch.logaddexp(others, log_sum_exp(queries.z, keys.projection, temperature, own_keys))
        return others

    def chance(self, seen: Seen, keys: Keys, views: Views) -> Float[Tensor, ""]:
        """InfoNCE of a network that cannot tell anything from anything."""
        count = 1.0 + seen.counted
        if self.config.objective.in_batch_negatives:
            count = count + len(keys.ids) - OwnRows(views.ids, keys.ids).counts()
        return count.log().mean()

    def beside_info_nce(
        self, queries: Queries, seen: Seen, views: Views, out: StepOutput | None
    ) -> Float[Tensor, ""] | None:
        """The term beside InfoNCE; MoCo-v2 has none. `out` receives what the log wants (first query crop only)."""
        return None

    @torch.no_grad()
    def encode_keys(self, views: Views) -> tuple[Keys, slice]:
        """The keys of all processes, and which of them are this process' own."""
        # The same on every process, and a resume goes on where it was: both know how many enqueues there were.
        stream = generator(self.config.run.seed, "key order", self.dictionary.count)
        g2, z2 = self.key_norm(self.pair.key, views.images[1], stream)
        g2, z2 = F.normalize(g2, dim=1), F.normalize(z2, dim=1)
        keys = Keys(*gather([g2, z2, views.ids, views.boxes[1]]))
        return keys, slice(rank() * len(z2), (rank() + 1) * len(z2))

    @torch.no_grad()
    def after_step(self, outputs: list[StepOutput]) -> None:
        self.pair.update(self.config.model.momentum)
        for out in outputs:
            self.dictionary.enqueue(out.keys.backbone, out.keys.projection, out.keys.ids, out.keys.boxes)
