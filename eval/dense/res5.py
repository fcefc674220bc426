"""The head of C4: the backbone's last stage on every proposal, then one more normalisation
(detectron2's Res5ROIHeads, with the extra norm of MoCo's configuration). Boxes and masks share it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference, maskrcnn_loss


class Res5Heads(RoIHeads):
    def __init__(
        self, pool: nn.Module, stage: nn.Module, channels: int, classes: int, masks: nn.Module | None, **settings: Any
    ) -> None:
        box_head = nn.Sequential(stage, nn.BatchNorm2d(channels))
        predictor = FastRCNNPredictor(channels, classes + 1)
        super().__init__(pool, box_head, predictor, mask_predictor=masks, **settings)

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if self.training:
            proposals, matched, labels, regression = self.select_training_samples(proposals, targets)
        maps = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        scores, boxes = self.box_predictor(maps.mean((2, 3)))
        if self.training:
            assert targets is not None
            class_loss, box_loss = fastrcnn_loss(scores, boxes, labels, regression)
            losses = {"loss_classifier": class_loss, "loss_box_reg": box_loss}
            if self.mask_predictor is not None:
                losses["loss_mask"] = self._mask_loss(maps, proposals, matched, labels, targets)
            return [], losses
        parts = zip(*self.postprocess_detections(scores, boxes, proposals, image_shapes), strict=True)
        found = [{"boxes": boxes, "scores": scores, "labels": labels} for boxes, scores, labels in parts]
        if self.mask_predictor is not None:
            pooled = self.box_roi_pool(features, [one["boxes"] for one in found], image_shapes)
            logits = self.mask_predictor(self.box_head(pooled))
            for one, masks in zip(found, maskrcnn_inference(logits, [one["labels"] for one in found]), strict=True):
                one["masks"] = masks
        return found, {}

    def _mask_loss(
        self,
        maps: Tensor,
        proposals: list[Tensor],
        matched: list[Tensor],
        labels: list[Tensor],
        targets: list[dict[str, Tensor]],
    ) -> Tensor:
        """On the proposals that hold an object, whose maps are there already."""
        held = [one > 0 for one in labels]
        logits = self.mask_predictor(maps[torch.cat(held)])
        boxes = [one[here] for one, here in zip(proposals, held, strict=True)]
        objects = [one[here] for one, here in zip(matched, held, strict=True)]
        masks, classes = [one["masks"] for one in targets], [one["labels"] for one in targets]
        return maskrcnn_loss(logits, boxes, masks, classes, objects)
