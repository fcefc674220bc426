"""The heads that classify proposals and predict boxes and masks, and their losses. Layers are torchvision's;
initialisation and losses are detectron2's; test_detectron2_networks.py compares the two."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.ops import roi_align

from mls.eval.dense.proposals import Coder


class Heads(RoIHeads):
    """Boxes, and masks if there is a mask predictor. C4 has no mask head: boxes and masks share their maps."""

    def __init__(self, *parts: Any, **settings: Any) -> None:
        super().__init__(*parts, **settings)
        self.box_coder = Coder(self.box_coder.weights)

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if self.training:
            return [], self.losses(features, proposals, image_shapes, targets)
        maps = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        scores, deltas = self.box_predictor(maps)
        parts = self.postprocess_detections(scores, deltas, proposals, image_shapes)
        found = [
            {"boxes": boxes, "scores": scores, "labels": labels} for boxes, scores, labels in zip(*parts, strict=True)
        ]
        if self.mask_predictor is not None:
            boxes = [one["boxes"] for one in found]
            logits = self.mask_predictor(self.mask_maps(features, boxes, image_shapes))
            for one, masks in zip(found, maskrcnn_inference(logits, [one["labels"] for one in found]), strict=True):
                one["masks"] = masks
        return found, {}

    def mask_maps(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        """The maps from which masks are predicted."""
        if self.mask_head is None or self.mask_roi_pool is None:
            return self.box_head(self.box_roi_pool(features, boxes, image_shapes))
        return self.mask_head(self.mask_roi_pool(features, boxes, image_shapes))

    def losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None,
    ) -> dict[str, Tensor]:
        """Masks are trained on the proposals that are matched with an object."""
        assert targets is not None
        proposals, matched, labels, wanted = self.select_training_samples(proposals, targets)
        maps = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        (scores, deltas), classes = self.box_predictor(maps), torch.cat(labels)
        losses = box_losses(scores, deltas, classes, torch.cat(wanted))
        if self.mask_predictor is None:
            return losses
        positive = [one > 0 for one in labels]
        boxes = [one[rows] for one, rows in zip(proposals, positive, strict=True)]
        numbers = [one[rows] for one, rows in zip(matched, positive, strict=True)]
        maps = maps[torch.cat(positive)] if self.mask_head is None else self.mask_maps(features, boxes, image_shapes)
        logits = self.mask_predictor(maps)
        parts = zip([one["masks"] for one in targets], boxes, numbers, strict=True)
        truth = torch.cat([masks_in_boxes(*part, logits.shape[-1]) for part in parts])
        return losses | {"loss_mask": mask_loss(logits, classes[classes > 0], truth)}


class BoxHead(FastRCNNConvFCHead):
    """Four normalised convolutions and a hidden layer."""

    def __init__(self, channels: int, size: int, width: int) -> None:
        super().__init__((channels, size, size), [channels] * 4, [width], nn.BatchNorm2d)
        hidden = self[-2]
        assert isinstance(hidden, nn.Linear)
        nn.init.kaiming_uniform_(hidden.weight, a=1)
        nn.init.zeros_(hidden.bias)


class BoxPredictor(FastRCNNPredictor):
    """Class scores, and a box for each class. Maps are averaged over their positions (C4)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__(channels, classes + 1)
        _initialise(self.cls_score, std=0.01)
        _initialise(self.bbox_pred, std=0.001)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x.mean((2, 3)) if x.dim() == 4 else x)


class MaskPredictor(MaskRCNNPredictor):
    """A mask for each class, of twice the maps' resolution."""

    conv5_mask: nn.ConvTranspose2d
    mask_fcn_logits: nn.Conv2d

    def __init__(self, channels: int, width: int, classes: int) -> None:
        super().__init__(channels, width, classes + 1)
        assert self.conv5_mask.bias is not None
        nn.init.zeros_(self.conv5_mask.bias)
        _initialise(self.mask_fcn_logits, std=0.001)


def _initialise(layer: nn.Linear | nn.Conv2d, std: float) -> None:
    nn.init.normal_(layer.weight, std=std)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)


def box_losses(
    scores: Float[Tensor, "boxes classes"],
    deltas: Float[Tensor, "boxes four_times_classes"],
    labels: Int64[Tensor, "boxes"],
    wanted: Float[Tensor, "boxes 4"],
) -> dict[str, Float[Tensor, ""]]:
    """Label 0 is the background, which has no box. The box loss is divided by the number of all boxes, so that
    the weight of an object does not depend on the number of objects."""
    positive = (labels > 0).nonzero()[:, 0]
    own = deltas.unflatten(1, (-1, 4))[positive, labels[positive]]
    return {
        "loss_classifier": F.cross_entropy(scores, labels),
        "loss_box_reg": F.l1_loss(own, wanted[positive], reduction="sum") / len(labels),
    }


def masks_in_boxes(
    masks: UInt8[Tensor, "objects height width"],
    boxes: Float[Tensor, "boxes 4"],
    numbers: Int64[Tensor, "boxes"],
    size: int,
) -> Float[Tensor, "boxes size size"]:
    """The mask of each box's object, 1 where at least half of a cell is covered."""
    rows = torch.cat([numbers[:, None].to(boxes), boxes], 1)
    return (roi_align(masks[:, None].to(boxes), rows, size, aligned=True)[:, 0] >= 0.5).to(boxes)


def mask_loss(
    logits: Float[Tensor, "boxes classes size size"],
    labels: Int64[Tensor, "boxes"],
    truth: Float[Tensor, "boxes size size"],
) -> Float[Tensor, ""]:
    if not len(labels):
        return logits.sum() * 0  # the mean of no boxes would be NaN
    return F.binary_cross_entropy_with_logits(logits[torch.arange(len(labels), device=labels.device), labels], truth)
