"""Faster R-CNN and Mask R-CNN of torchvision's parts, on a feature pyramid or on the fourth stage (C4), as detectron2
is configured for self-supervised backbones, and on ViTDet's simple pyramid: all layers are trained, heads have batch
normalisation, RoIAlign is aligned. Losses that differ from torchvision's are in proposals.py and roi_heads.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import roi_align
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from mls.errors import ConfigError
from mls.eval.data.objects import encode
from mls.eval.dense.coco_ap import Detections
from mls.eval.dense.proposals import Anchors, Proposals
from mls.eval.dense.roi_heads import BoxHead, BoxPredictor, Heads, MaskPredictor
from mls.eval.dense.schema import Detection, DetectorConfig
from mls.eval.dense.trunk import Intermediates, Maps, Trunk, build_trunk
from mls.eval.dense.views import ObjectTarget
from mls.models.backbones import Backbone

BOX_SIZE, MASK_SIZE = 7, 14  # of the pooled maps of a proposal
CANONICAL = 224  # pixels: a box of this size is pooled from the map of stride 16


class Detector(nn.Module):
    """uint8 images of any size to losses; `predict` returns detections.

    >>> from mls.eval.dense.schema import DetectionData
    >>> from mls.models import load_backbone
    >>> data, model = DetectionData(min_sizes=[32], test_size=32), DetectorConfig(anchors=[8, 16, 24])
    >>> protocol = Detection(data=data, model=model)
    >>> detector = Detector(load_backbone("resnet_tiny"), protocol, 10, (0.5,) * 3, (0.2,) * 3).eval()
    >>> found = detector.predict([torch.zeros(3, 30, 40, dtype=torch.uint8)])
    >>> found[0].boxes.shape[1]
    4
    """

    def __init__(
        self,
        backbone: Backbone,
        protocol: Detection,
        classes: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        trunk, self.masks, data = build_trunk(backbone), protocol.model.masks, protocol.data
        body, heads = PARTS[protocol.model.neck](trunk, protocol.model, classes)
        sizes = protocol.model.anchors
        anchors = Anchors([[size] for size in sizes] if protocol.model.neck == "fpn" else [sizes], body.strides)
        proposals = Proposals(
            anchors,
            RPNHead(body.out_channels, anchors.count),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=protocol.model.proposal_batch,
            positive_fraction=0.5,
            pre_nms_top_n=dict(zip(("training", "testing"), protocol.model.before_nms, strict=True)),
            post_nms_top_n=dict(zip(("training", "testing"), protocol.model.proposals, strict=True)),
            nms_thresh=0.7,
        )
        # torchvision's annotation says int; its code takes a list, too.
        resize = GeneralizedRCNNTransform(cast(Any, data.min_sizes), data.max_size, list(mean), list(std), body.divisor)
        self.model = GeneralizedRCNN(body, proposals, heads, resize)
        self.test_size, self.min_sizes = data.test_size, data.min_sizes

    @property
    def resize(self) -> Any:
        return self.model.transform

    def forward(
        self, images: Sequence[UInt8[Tensor, "3 height width"]], targets: Sequence[ObjectTarget]
    ) -> dict[str, Float[Tensor, ""]]:
        device = next(self.parameters()).device
        self.resize.min_size = self.min_sizes
        truth = []
        for target in targets:
            one = {"boxes": target.boxes.to(device), "labels": target.classes.to(device) + 1}
            if self.masks:
                assert target.masks is not None
                one["masks"] = target.masks.to(device)
            truth.append(one)
        return self.model([image.to(device) / 255 for image in images], truth)

    @torch.no_grad()
    def predict(self, images: Sequence[UInt8[Tensor, "3 height width"]]) -> list[Detections]:
        """Boxes are in pixels of `images`, before they are scaled."""
        device = next(self.parameters()).device
        self.resize.min_size = [self.test_size]
        found = self.model([image.to(device) / 255 for image in images])
        return [
            Detections(
                one["boxes"].float().cpu(),
                one["scores"].float().cpu(),
                one["labels"].cpu() - 1,
                encode(one["masks"][:, 0].cpu() > 0.5) if self.masks else None,
            )
            for one in found
        ]


class Pyramid(nn.Module):
    """A feature pyramid on all stages, or on a transformer's last map. One more level, by subsampling, if the settings
    have one more anchor."""

    def __init__(self, trunk: Trunk | Intermediates, settings: DetectorConfig) -> None:
        super().__init__()
        self.trunk, self.out_channels = trunk, settings.width
        channels, self.strides = list(trunk.channels.values()), pyramid_strides(trunk, settings)
        self.divisor = self.strides[-1]  # of the padded sides: each map must be twice as large as the next
        more = LastLevelMaxPool() if len(settings.anchors) > len(self.strides) else None
        self.pyramid: nn.Module = (
            SimplePyramid(channels[-1], settings.width, more)
            if trunk.plain
            else FeaturePyramidNetwork(channels, settings.width, more, norm_layer=nn.BatchNorm2d)
        )
        self.pooled = list(self.strides)  # boxes are not pooled from the subsampled level
        if more is not None:
            self.strides.append(2 * self.strides[-1])

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Maps:
        return self.pyramid(self.trunk(images))


def pyramid_strides(trunk: Trunk | Intermediates, settings: DetectorConfig) -> list[int]:
    """Without the subsampled level."""
    strides = list(trunk.strides.values())
    if trunk.plain:
        patch = strides[-1]
        if patch % 4:
            raise ConfigError(
                f"patches of {patch} pixels make no pyramid: choose a transformer with patches of 4, 8 or 16"
            )
        strides = [patch // 4, patch // 2, patch, 2 * patch]
    levels, sizes = len(strides), len(settings.anchors)
    if sizes not in (levels, levels + 1):
        raise ConfigError(
            f"model.anchors has {sizes} sizes and the backbone's pyramid {levels} levels: give {levels} sizes, or "
            f"{levels + 1} for one more level"
        )
    return strides


class SimplePyramid(nn.Module):
    """Maps of a quarter, half, once and twice the stride of a transformer's last map (ViTDet,
    https://arxiv.org/abs/2203.16527). The windows that ViTDet puts into most blocks to save memory on large images are
    left out: the network stays as it was pretrained."""

    def __init__(self, channels: int, width: int, more: LastLevelMaxPool | None) -> None:
        super().__init__()
        half, quarter, up = channels // 2, channels // 4, lambda i, o: nn.ConvTranspose2d(i, o, 2, stride=2)
        scaled: list[tuple[int, list[nn.Module]]] = [
            (quarter, [up(channels, half), _norm(half), nn.GELU(), up(half, quarter)]),
            (half, [up(channels, half)]),
            (channels, []),
            (channels, [nn.MaxPool2d(2)]),
        ]
        self.levels = nn.ModuleList(
            nn.Sequential(
                *layers,
                nn.Conv2d(inputs, width, 1, bias=False),
                _norm(width),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                _norm(width),
            )
            for inputs, layers in scaled
        )
        self.more = more

    def forward(self, maps: Maps) -> Maps:
        last = list(maps.values())[-1]
        found, names = [level(last) for level in self.levels], [str(number) for number in range(len(self.levels))]
        if self.more is not None:
            found, names = self.more(found, [last], names)
        return dict(zip(names, found, strict=True))


def _norm(channels: int) -> nn.Module:
    return LayerNorm2d(channels, eps=1e-6)


class FourthStage(nn.Module):
    """All stages but the last."""

    divisor = 1  # images are padded to the largest of a batch

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk, name = trunk, trunk.names[-1]
        self.out_channels, self.strides = trunk.channels[name], [trunk.strides[name]]

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Maps:
        return {"0": self.trunk(images)[self.trunk.names[-1]]}


class Pool(nn.Module):
    """RoIAlign on the level for a box's size, aligned as in detectron2 (torchvision's default is half a pixel off)."""

    def __init__(self, size: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.size, self.strides = size, strides

    def forward(
        self, maps: Maps, boxes: list[Float[Tensor, "_ 4"]], image_shapes: list[tuple[int, int]]
    ) -> Float[Tensor, "boxes channels size size"]:
        levels = list(maps.values())[: len(self.strides)]
        rows = torch.cat([F.pad(one, (1, 0), value=image) for image, one in enumerate(boxes)])
        pooled = levels[0].new_zeros(len(rows), levels[0].shape[1], self.size, self.size)
        level_of = self.level_of(rows[:, 1:])
        for number, (one, stride) in enumerate(zip(levels, self.strides, strict=True)):
            on_level = (level_of == number).nonzero()[:, 0]
            part = roi_align(one, rows[on_level], self.size, 1 / stride, sampling_ratio=0, aligned=True)
            pooled = pooled.index_put((on_level,), part)
        return pooled

    def level_of(self, boxes: Float[Tensor, "boxes 4"]) -> Tensor:
        """A box of 224 pixels belongs to the map of stride 16, one of 112 pixels to that of stride 8."""
        side = (boxes[:, 2:] - boxes[:, :2]).prod(1).clamp(min=0).sqrt()
        wanted = (4 + torch.log2(side / CANONICAL + 1e-8)).floor()
        first = torch.tensor(float(self.strides[0])).log2().item()
        return (wanted - first).clamp(0, len(self.strides) - 1).long()


def _with_pyramid(trunk: Trunk | Intermediates, settings: DetectorConfig, classes: int) -> tuple[Pyramid, Heads]:
    body, width = Pyramid(trunk, settings), settings.width
    parts = {}
    if settings.masks:
        parts = {
            "mask_roi_pool": Pool(MASK_SIZE, body.pooled),
            "mask_head": MaskRCNNHeads(width, [width] * 4, 1, nn.BatchNorm2d),
            "mask_predictor": MaskPredictor(width, width, classes),
        }
    box_head, predictor = BoxHead(width, BOX_SIZE, settings.box_width), BoxPredictor(settings.box_width, classes)
    return body, Heads(Pool(BOX_SIZE, body.pooled), box_head, predictor, **_box_settings(settings), **parts)


def _with_res5(trunk: Trunk | Intermediates, settings: DetectorConfig, classes: int) -> tuple[FourthStage, Heads]:
    """The head is the backbone's last stage on every proposal, then one more normalisation (detectron2's Res5ROIHeads,
    with the extra norm of MoCo's configuration)."""
    if isinstance(trunk, Intermediates):
        raise ConfigError(f"model.neck=c4 needs a ResNet, {type(trunk.network).__name__} is none: set model.neck=fpn")
    channels, last = trunk.channels[trunk.names[-1]], trunk.take_last()
    body, box_head = FourthStage(trunk), nn.Sequential(last, nn.BatchNorm2d(channels))
    masks = MaskPredictor(channels, settings.width, classes) if settings.masks else None
    pool, predictor = Pool(2 * BOX_SIZE, body.strides), BoxPredictor(channels, classes)
    return body, Heads(pool, box_head, predictor, mask_predictor=masks, **_box_settings(settings))


def _box_settings(settings: DetectorConfig) -> dict[str, float | int | None]:
    return {
        "fg_iou_thresh": 0.5,
        "bg_iou_thresh": 0.5,
        "batch_size_per_image": settings.box_batch,
        "positive_fraction": 0.25,
        "bbox_reg_weights": None,  # 10, 10, 5, 5
        "score_thresh": settings.score,
        "nms_thresh": settings.nms,
        "detections_per_img": settings.detections,
    }


PARTS = {"fpn": _with_pyramid, "c4": _with_res5}
