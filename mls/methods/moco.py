"""MoCo-v2 (https://arxiv.org/abs/2003.04297): each query is told from the dictionary's rows by its own key."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mls.config import Config
from mls.data import Views
from mls.dictionary import Dictionary, Rows
from mls.distributed import gather, rank
from mls.losses import info_nce
from mls.methods.base import Keys, Method, StepOutput
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
        width = pair.query.backbone.feature_dim
        self.dictionary = Dictionary(config.dictionary.size, backbone=width, projection=config.model.projection)

    def forward(self, views: Views) -> StepOutput:
        objective = self.config.objective
        rows = self.dictionary.rows()  # one state for everything below
        keys, own = self.encode_keys(views)
        own_rows = self.own_rows(views, rows)  # rows that may be neither match nor negative

        z2 = keys.projection[own]
        negatives, left_out = rows.projection, own_rows
        if objective.in_batch_negatives:
            negatives = torch.cat([rows.projection, keys.projection])
            other = keys.ids[None] == views.ids[:, None]  # its own key is the positive, never a negative
            no_rows = torch.zeros(len(z2), len(rows.ids), dtype=torch.bool, device=z2.device)
            left_out = torch.cat([own_rows if own_rows is not None else no_rows, other], dim=1)

        queries = [views.images[0], *views.images[2:]]  # small crops are queries too
        out = StepOutput(loss=z2.new_zeros(()), keys=keys, query_ids=views.ids)
        for number, images in enumerate(queries):
            g1, z1 = self.pair.query(images)
            g1, z1 = F.normalize(g1, dim=1), F.normalize(z1, dim=1)
            contrast = info_nce(z1, z2, negatives, objective.temperature, mask=left_out)
            part = self.beside_info_nce(g1, z1, rows, own_rows, views, out if number == 0 else None)
            total = contrast if part is None else contrast + objective.weight * part
            out.loss = out.loss + total / len(queries)
            if number == 0:
                out.outputs = [z1, g1]
                out.parts["info_nce"] = contrast
                if part is not None:
                    out.parts["multi_label"] = objective.weight * part
                out.scalars["loss/info_nce"] = contrast.detach()
                out.scalars["chance/info_nce"] = _chance(contrast, len(negatives), left_out)
                out.scalars["cosine/own_key"] = (z1 * z2).sum(1).mean().detach()
        out.scalars["loss"] = out.loss.detach()
        return out

    def beside_info_nce(
        self,
        g1: Float[Tensor, "batch features"],
        z1: Float[Tensor, "batch projection"],
        rows: Rows,
        own_rows: Bool[Tensor, "batch rows"] | None,
        views: Views,
        out: StepOutput | None,
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

    def own_rows(self, views: Views, rows: Rows) -> Bool[Tensor, "batch rows"] | None:
        if self.config.dictionary.own_rows == "keep":
            return None
        return views.ids[:, None] == rows.ids[None]

    @torch.no_grad()
    def after_step(self, outputs: list[StepOutput]) -> None:
        self.pair.update(self.config.model.momentum)
        for out in outputs:
            self.dictionary.enqueue(out.keys.backbone, out.keys.projection, out.keys.ids, out.keys.boxes)


def _chance(like: Tensor, negatives: int, left_out: Bool[Tensor, "batch negatives"] | None) -> Float[Tensor, ""]:
    """InfoNCE of a network that cannot tell anything from anything."""
    count = like.new_full((), 1 + negatives)
    return count.log() if left_out is None else (count - left_out.sum(1)).log().mean()
