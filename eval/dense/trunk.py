"""The feature maps of a backbone's stages, dilated for a smaller output stride. The modules are the backbone's own,
with its pretrained weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mls.errors import ConfigError
from mls.models.backbones import Backbone
from mls.models.spatial import dilate

Maps = dict[str, Float[Tensor, "batch channels height width"]]


class Trunk(nn.Module):
    """The stem and the stages of a ResNet, the maps of all stages as its output: layer1 and so on.

    >>> from mls.models import load_backbone
    >>> trunk = Trunk(load_backbone("resnet_tiny"))
    >>> {name: tuple(part.shape) for name, part in trunk(torch.rand(1, 3, 32, 32)).items()}
    {'layer1': (1, 32, 16, 16), 'layer2': (1, 64, 8, 8), 'layer3': (1, 128, 4, 4)}
    >>> trunk.channels, trunk.strides
    ({'layer1': 32, 'layer2': 64, 'layer3': 128}, {'layer1': 2, 'layer2': 4, 'layer3': 8})
    """

    def __init__(self, backbone: Backbone, output_stride: int | None = None) -> None:
        """`output_stride`: stages with a larger stride are dilated."""
        super().__init__()
        parts = dict(backbone.named_children())
        self.names = [name for name in parts if name.startswith("layer")]
        if len(self.names) < 2 or not {"conv1", "bn1"} <= parts.keys():
            raise ConfigError(
                f"{type(backbone).__name__} has no stages layer1, layer2 ... behind conv1 and bn1: detection and "
                "segmentation need a ResNet, such as resnet50, resnet_tiny or timm:resnet50"
            )
        self.conv1, self.bn1 = parts["conv1"], parts["bn1"]
        self.maxpool = parts.get("maxpool", nn.Identity())
        for name in self.names:
            self.add_module(name, parts[name])
        if output_stride is not None:
            stages = {name: self.get_submodule(name) for name in self.names}
            dilate(stages, _measure(self)[1], output_stride)
        self.channels, self.strides = _measure(self)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Maps:
        x, maps = self.maxpool(torch.relu(self.bn1(self.conv1(images)))), {}
        for name in self.names:
            maps[name] = x = self.get_submodule(name)(x)
        return maps

    def take_last(self) -> nn.Module:
        """Remove the last stage and return it: C4's detector uses it as its head."""
        name = self.names.pop()
        last = self.get_submodule(name)
        delattr(self, name)
        return last


@torch.no_grad()
def _measure(trunk: Trunk) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """The channels of each stage, and its stride in pixels of the image."""
    training, size = trunk.training, 64
    device = next(trunk.parameters()).device
    maps = trunk.eval()(torch.zeros(1, 3, size, size, device=device))
    trunk.train(training)
    channels = {name: one.shape[1] for name, one in maps.items()}
    return channels, {name: size // one.shape[2] for name, one in maps.items()}
