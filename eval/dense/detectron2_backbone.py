"""Networks that detectron2 does not have, as our own detector takes them (trunk.py), under its pyramids. detectron2's
ViT would be another network than the one that was pretrained: it has neither class token nor registers nor the last
normalisation, and it interpolates positions in another way. Importing this file registers NAME."""

from __future__ import annotations

from typing import Any

from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone  # pyright: ignore
from detectron2.modeling.backbone.fpn import LastLevelMaxPool  # pyright: ignore
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid  # pyright: ignore
from torch import Tensor, nn

from mls.eval.dense.trunk import Maps, build_trunk
from mls.models import backbones


class OurBackbone(Backbone):
    def __init__(self, architecture: str, synced: bool) -> None:
        super().__init__()
        self.trunk = trunk = build_trunk(backbones.build(architecture))
        if synced:
            nn.SyncBatchNorm.convert_sync_batchnorm(trunk)
        self._out_features = list(trunk.names)
        self._out_feature_channels, self._out_feature_strides = dict(trunk.channels), dict(trunk.strides)

    def forward(self, images: Tensor) -> Maps:
        return self.trunk(images)


class SimplePyramid(SimpleFeaturePyramid):
    @property
    def size_divisibility(self) -> int:
        """Images are filled up to whole maps. detectron2 misspells its own key: ViTDet's images are all one square."""
        return self._size_divisibility


@BACKBONE_REGISTRY.register()
def build_our_pyramid(cfg: Any, input_shape: Any) -> Backbone:
    """ViTDet's pyramid on a transformer's last map, without ViTDet's windows and relative positions, which the weights
    were not trained with; FPN on the stages of other networks."""
    network, norm, width = cfg.MODEL.TRUNK, cfg.MODEL.FPN.NORM, cfg.MODEL.FPN.OUT_CHANNELS
    below, more = OurBackbone(network, norm == "SyncBN"), LastLevelMaxPool()
    more.in_feature = cfg.MODEL.ROI_HEADS.IN_FEATURES[-1]
    if below.trunk.plain:
        return SimplePyramid(below, below.trunk.names[-1], width, (4.0, 2.0, 1.0, 0.5), more)
    return FPN(below, below.trunk.names, width, norm, more)


NAME = build_our_pyramid.__name__
