"""SlotCon (https://arxiv.org/abs/2205.15288): the cells of a map are assigned to learnt prototypes, alike in both crops
where these overlap (grouping), and what each prototype gathers in a crop, its slot, is told from the slots of all other
images and prototypes by the other crop's slot of the same prototype. With x = head(map) of the query encoder and y of
the key encoder, both ways:

    a = cos(x, prototypes), slot = sum over cells of softmax(a / t)-weighted x          [batch, prototypes, width]
    loss = w · CE(a1 / student t, softmax((b2 - centre) / t)) + (1 - w) · 2 τ InfoNCE(predictor(slots1), slots2, τ)

The paper's key encoder slows down to a stop: model.momentum=0.99 model.final_momentum=1.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torchvision.ops import roi_align

from mls.config import Config, SlotConOptions
from mls.core.method import Method, StepOutput
from mls.core.methods import register
from mls.data import ViewPlan, Views
from mls.distributed import gather, rank
from mls.models import Backbone, Encoder, EncoderPair, Precision, build_encoder
from mls.streams import initialisation

EPSILON = 1e-6  # of every cell for every slot
LEAST_OVERLAP = 0.01  # share of a crop; images whose crops have less in common take no part in grouping


def mlp(widths: list[int], linear: type[nn.Linear] | type[nn.Conv2d]) -> nn.Sequential:
    """Linear layers with normalisation and GELU between; for maps 1 x 1 convolutions."""
    two, norm = linear is nn.Conv2d, nn.BatchNorm2d if linear is nn.Conv2d else nn.BatchNorm1d
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layer = nn.Conv2d(before, after, 1) if two else nn.Linear(before, after)
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(cast(Tensor, layer.bias))
        layers += [layer, norm(after), nn.GELU()]
    return nn.Sequential(*layers[:-2])


class SlotEncoder(nn.Module):
    """Images to slots [batch, prototypes, width] and to the cosine of each cell with each prototype."""

    def __init__(self, encoder: Encoder, width: int, options: SlotConOptions) -> None:
        super().__init__()
        self.encoder, self.temperature = encoder, options.teacher_temperature
        encoder.head = nn.Identity()  # whole crops are not projected
        hidden = options.hidden
        self.head = mlp([encoder.backbone.feature_dim, hidden, hidden, width], nn.Conv2d)
        self.prototypes = nn.Parameter(torch.randn(options.prototypes, width))

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> tuple[Tensor, Tensor]:
        x = self.head(self.encoder.spatial(images)[2])  # [batch, width, rows, columns]
        cosines = torch.einsum("kd,bdhw->bkhw", F.normalize(self.prototypes, dim=1), F.normalize(x, dim=1))
        shares = (cosines / self.temperature).softmax(dim=1) + EPSILON
        slots = torch.einsum("bdhw,bkhw->bkd", x, shares / shares.sum(dim=(2, 3), keepdim=True))
        return slots, cosines


def overlap(views: Views, view: int) -> Float[Tensor, "batch 4"]:
    """What views 0 and 1 have in common, as x0 y0 x1 y1 in shares of this one, as it was flipped."""
    both, own = torch.stack(views.boxes[:2]), views.boxes[view]
    common = torch.cat([both[:, :, :2].amax(0), both[:, :, 2:].amin(0)], dim=1)
    size = (own[:, 2:] - own[:, :2]).repeat(1, 2)
    x0, y0, x1, y1 = ((common - own[:, :2].repeat(1, 2)) / size).unbind(dim=1)
    flip = views.flips[view]
    return torch.stack([torch.where(flip, 1 - x1, x0), y0, torch.where(flip, 1 - x0, x1), y1], dim=1)


def aligned(
    cosines: Float[Tensor, "batch prototypes rows columns"], box: Float[Tensor, "batch 4"], flips: Bool[Tensor, "batch"]
) -> Float[Tensor, "batch prototypes rows columns"]:
    """The part of the map in the box, at the size of the whole, as it lies in the image."""
    rows, columns = cosines.shape[2:]
    numbers = torch.arange(len(box), device=box.device)[:, None]
    places = torch.cat([numbers, box * box.new_tensor([columns, rows, columns, rows])], dim=1).to(cosines)
    found = roi_align(cosines, places, (rows, columns), aligned=True)
    return torch.where(flips[:, None, None, None], found.flip(3), found)


@register("slotcon", SlotConOptions)
class SlotCon(Method):
    centre: Tensor

    def __init__(self, config: Config, precision: Precision = "fp32", image_labels: Tensor | None = None) -> None:
        super().__init__(config, precision, image_labels)
        self.options = options = cast(SlotConOptions, config.objective)
        encoder, width = build_encoder(config.model, config.run.seed, precision), config.model.projection
        with initialisation(config.run.seed, "slots"):
            self.pair = EncoderPair(SlotEncoder(encoder, width, options))
            self.predictor = mlp([width, options.hidden, options.hidden, width], nn.Linear)
        self.register_buffer("centre", torch.zeros(options.prototypes))

    @property
    def backbone(self) -> Backbone:
        return self.pair.query.encoder.backbone

    def views(self) -> ViewPlan:
        return ViewPlan.crops(self.config.augment, positions=True)

    def forward(self, views: Views) -> StepOutput:
        queries = [self.pair.query(images) for images in views.images[:2]]
        with torch.no_grad():
            keys = [self.pair.key(images) for images in views.images[:2]]
        boxes = [overlap(views, view) for view in range(2)]
        same = (
            torch.stack([(box[:, 2:] - box[:, :2]).clamp(min=0).prod(dim=1) for box in boxes]).amin(0) >= LEAST_OVERLAP
        )
        grouping, contrast = queries[0][0].new_zeros(()), queries[0][0].new_zeros(())
        for one, other in ((0, 1), (1, 0)):
            q, k = (
                aligned(part[view][1], boxes[view], views.flips[view]) for part, view in ((queries, one), (keys, other))
            )
            grouping = grouping + self.grouping(q[same], k[same])
            contrast = contrast + self.contrast(*queries[one], *keys[other])
        share = self.options.group_weight
        loss = share * grouping + (1 - share) * contrast
        used = torch.stack([present(cosines).float().mean() for _, cosines in keys]).mean()
        scalars = {"loss": loss.detach(), "loss/grouping": grouping.detach(), "loss/slots": contrast.detach()}
        return StepOutput(loss, scalars | {"slots/used": used}, keys=torch.stack([cosines for _, cosines in keys]))

    def grouping(self, q: Tensor, k: Tensor) -> Float[Tensor, ""]:
        """Cross-entropy of each cell's assignment with the other crop's, which is centred so that no prototype takes
        all."""
        log_q = (q / self.options.student_temperature).log_softmax(dim=1)
        target = ((k - self.centre[None, :, None, None]) / self.options.teacher_temperature).softmax(dim=1)
        return -(target * log_q).sum(dim=1).sum() / max(1, log_q[:, 0].numel())

    def contrast(self, q: Tensor, cosines_q: Tensor, k: Tensor, cosines_k: Tensor) -> Float[Tensor, ""]:
        """InfoNCE of the slots that are present in both crops, against those of all images, whatever the prototype."""
        there = present(cosines_k)
        keys, existing = gather([F.normalize(k, dim=2), there])  # [images of all, prototypes, ...]
        asking = (present(cosines_q) & there).flatten().nonzero().squeeze(1)
        if len(asking) < 2:  # batch normalisation has no statistics of one row
            return 0.0 * torch.stack([parameter.sum() for parameter in self.predictor.parameters()]).sum()
        rows = existing.flatten().nonzero().squeeze(1)
        predicted = F.normalize(self.predictor(q.flatten(0, 1)[asking]), dim=1)
        logits = predicted @ keys.flatten(0, 1)[rows].T / self.options.temperature
        own = torch.searchsorted(rows, asking + rank() * there.numel())
        return 2 * self.options.temperature * F.cross_entropy(logits, own)

    @torch.no_grad()
    def after_step(self, outputs: list[StepOutput]) -> None:
        self.pair.update(self.momentum)
        for out in outputs:
            (means,) = gather([out.keys.mean(dim=(0, 1, 3, 4))[None]])
            self.centre.lerp_(means.mean(dim=0), 1 - self.options.centre_momentum)


def present(cosines: Float[Tensor, "batch prototypes rows columns"]) -> Bool[Tensor, "batch prototypes"]:
    """The prototypes that are the nearest of any cell."""
    nearest = cosines.argmax(dim=1).flatten(1)
    return F.one_hot(nearest, cosines.shape[1]).amax(dim=1).bool()
