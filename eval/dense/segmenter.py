"""A backbone, dilated where it has stages, a head and an auxiliary FCN (mmsegmentation's EncoderDecoder): images to
losses in training, to a class for every pixel in the test."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv

from mls.data.pictures import VOID
from mls.eval.dense.heads import FCN, PSPNet, resized
from mls.eval.dense.psanet import PSANet
from mls.eval.dense.schema import Segmentation, SegmenterConfig
from mls.eval.dense.trunk import build_trunk
from mls.eval.dense.views import fitting
from mls.models.backbones import Backbone
from mls.models.spatial import patches_of


class Segmenter(nn.Module):
    """
    >>> from mls.eval.dense.schema import SegmentationData
    >>> from mls.models import load_backbone
    >>> model = SegmenterConfig(width=16, auxiliary_width=8)
    >>> protocol = Segmentation(data=SegmentationData(resize=(32, 32)), model=model)
    >>> segmenter = Segmenter(load_backbone("resnet_tiny"), protocol, 11, (0.5,) * 3, (0.2,) * 3).eval()
    >>> segmenter.predict([torch.zeros(3, 30, 40, dtype=torch.uint8)])[0].shape
    torch.Size([30, 40])
    """

    def __init__(
        self,
        backbone: Backbone,
        protocol: Segmentation,
        classes: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        settings = protocol.model
        self.data, self.classes, self.settings = protocol.data, classes, settings
        self.trunk = build_trunk(backbone, settings.output_stride)
        self.patch = patches_of(backbone) if self.trunk.plain else (1, 1)
        self.last, self.before = self.trunk.names[-1], self.trunk.names[-2:][0]
        self.head = HEADS[settings.head](self.trunk.channels[self.last], settings, classes)
        width, channels = settings.auxiliary_width, self.trunk.channels[self.before]
        self.auxiliary = FCN(channels, width, classes, settings.dropout, convolutions=1)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(
        self, images: Sequence[UInt8[Tensor, "3 height width"]], targets: Sequence[UInt8[Tensor, "height width"]]
    ) -> dict[str, Float[Tensor, ""]]:
        width, height = self.data.crop
        fill = lambda image, value: F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2]), value=value)
        views = torch.stack([fill(self.normalised(image), 0.0) for image in images])
        labels = torch.stack([fill(target, VOID) for target in targets]).to(views.device).long()
        maps = self.trunk(views)
        weight = self.settings.auxiliary_weight
        return {
            "loss_head": self.loss(self.head(maps[self.last]), labels),
            "loss_auxiliary": weight * self.loss(self.auxiliary(maps[self.before]), labels),
        }

    def loss(
        self, scores: Float[Tensor, "batch classes map_height map_width"], labels: Int64[Tensor, "batch height width"]
    ) -> Float[Tensor, ""]:
        """Cross-entropy, averaged over all pixels; void pixels count with loss 0, so that a crop full of them weighs
        less."""
        scores = self.over_view(scores, labels.shape[1:])
        return F.cross_entropy(scores, labels, ignore_index=VOID, reduction="sum") / labels.numel()

    @torch.no_grad()
    def predict(self, images: Sequence[UInt8[Tensor, "3 height width"]]) -> list[Int64[Tensor, "height width"]]:
        """Images are processed one by one, as they may differ in size."""
        return [self._predict(image) for image in images]

    def _predict(self, image: UInt8[Tensor, "3 height width"]) -> Int64[Tensor, "height width"]:
        view = self.normalised(tv.resize(image, list(fitting(image, self.data.resize)), antialias=False))[None]
        scores = self._slide(view) if self.data.test == "slide" else self._scores(view)
        return resized(scores, image.shape[1:], self.settings.align_corners)[0].argmax(0).cpu()

    def normalised(self, image: UInt8[Tensor, "3 height width"]) -> Float[Tensor, "3 height width"]:
        return (image.to(self.mean.device) / 255 - self.mean) / self.std

    def _scores(self, view: Float[Tensor, "1 3 height width"]) -> Float[Tensor, "1 classes height width"]:
        scores = self.head(self.trunk(view)[self.last])
        return self.over_view(scores, view.shape[2:])

    def over_view(
        self, scores: Float[Tensor, "batch classes map_height map_width"], size: Sequence[int]
    ) -> Float[Tensor, "batch classes height width"]:
        """A transformer fills its view up to whole patches: what its map says of the filling is cut off."""
        height, width = size
        whole = (height + -height % self.patch[0], width + -width % self.patch[1])
        return resized(scores, whole, self.settings.align_corners)[..., :height, :width].float()

    def _slide(self, view: Float[Tensor, "1 3 height width"]) -> Float[Tensor, "1 classes height width"]:
        """The mean over overlapping windows; the last one of a row or column ends with the image."""
        height, width = view.shape[2:]
        total = view.new_zeros(1, self.classes, height, width)
        times = view.new_zeros(1, 1, height, width)
        for top in starts(height, self.data.crop[1], self.data.stride[1]):
            for left in starts(width, self.data.crop[0], self.data.stride[0]):
                window = (..., slice(top, top + self.data.crop[1]), slice(left, left + self.data.crop[0]))
                total[window] += self._scores(view[window])
                times[window] += 1
        return total / times


def starts(length: int, window: int, stride: int) -> list[int]:
    """The first pixel of each window.

    >>> starts(1024, 769, 513), starts(2048, 769, 513), starts(500, 769, 513)
    ([0, 255], [0, 513, 1026, 1279], [0])
    """
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(0, min(number * stride, length - window)) for number in range(count)]


def _fcn(channels: int, settings: SegmenterConfig, classes: int) -> nn.Module:
    return FCN(channels, settings.width, classes, settings.dropout)


def _pspnet(channels: int, settings: SegmenterConfig, classes: int) -> nn.Module:
    return PSPNet(channels, settings.width, classes, settings.dropout, settings.align_corners)


def _psanet(channels: int, settings: SegmenterConfig, classes: int) -> nn.Module:
    return PSANet(channels, settings.width, classes, settings.dropout)


HEADS = {"fcn": _fcn, "pspnet": _pspnet, "psanet": _psanet}
