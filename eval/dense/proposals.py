"""Anchors and the region proposal network (RPN): torchvision's, changed where detectron2 differs from it;
test_detectron2_networks.py compares the two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork

RATIOS = (0.5, 1.0, 2.0)  # height to width


class Anchors(nn.Module):
    """Boxes around every position of the maps, by size and then by ratio. Their sides are not rounded, and positions
    are exactly a stride apart, also if the image size is not a multiple of it.

    >>> anchors = Anchors([[16, 32]], [8])
    >>> anchors.count, anchors(ImageList(torch.zeros(1, 3, 9, 8), [(9, 8)]), [torch.zeros(1, 4, 2, 1)])[0].shape
    (6, torch.Size([12, 4]))
    """

    def __init__(self, sizes: Sequence[Sequence[int]], strides: Sequence[int]) -> None:
        """`sizes`: of the anchors of each map; the same number for all maps."""
        super().__init__()
        self.cells: Tensor
        self.strides, self.count = strides, len(sizes[0]) * len(RATIOS)
        sides = [[(size / ratio**0.5, size * ratio**0.5) for size in level for ratio in RATIOS] for level in sizes]
        halves = torch.tensor(sides) / 2
        self.register_buffer("cells", torch.cat([-halves, halves], 2), persistent=False)

    def forward(self, images: ImageList, maps: list[Tensor]) -> list[Float[Tensor, "anchors 4"]]:
        levels = []
        for one, stride, cell in zip(maps, self.strides, self.cells, strict=True):
            down, right = (torch.arange(side, device=cell.device) * stride for side in one.shape[-2:])
            y, x = torch.meshgrid(down, right, indexing="ij")
            levels.append((torch.stack([x, y, x, y], 2)[:, :, None] + cell).view(-1, 4))
        return [torch.cat(levels)] * len(images.image_sizes)


class Coder(BoxCoder):
    """Decodes boxes in fp32: above 256, bf16 cannot represent odd numbers."""

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        return super().decode_single(rel_codes.float(), boxes)


class Proposals(RegionProposalNetwork):
    """With an L1 loss, divided by the number of anchors that should be sampled, not of those that are; boxes of any
    area above 0 are kept."""

    def __init__(self, *parts: Any, **settings: Any) -> None:
        super().__init__(*parts, **settings)
        self.box_coder = Coder(self.box_coder.weights)
        self.min_size = torch.finfo(torch.float32).tiny

    def compute_loss(
        self,
        objectness: Float[Tensor, "anchors 1"],
        pred_bbox_deltas: Float[Tensor, "anchors 4"],
        labels: list[Float[Tensor, "_"]],
        regression_targets: list[Float[Tensor, "_ 4"]],
    ) -> tuple[Tensor, Tensor]:
        objects, others = (torch.cat(one).bool() for one in self.fg_bg_sampler(labels))
        sampled, wanted = objects | others, torch.cat(regression_targets)
        scores = F.binary_cross_entropy_with_logits(objectness[sampled, 0], torch.cat(labels)[sampled], reduction="sum")
        boxes = F.l1_loss(pred_bbox_deltas[objects], wanted[objects], reduction="sum")
        count = self.fg_bg_sampler.batch_size_per_image * len(labels)
        return scores / count, boxes / count
