"""The feature maps of a backbone's stages, dilated for a smaller output stride: of ResNets, and of what timm gives with
`features_only`. The modules are the backbone's own, with its pretrained weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mls.errors import ConfigError, reason
from mls.models.backbones import Backbone
from mls.models.spatial import dilate, dilated

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

    plain = False

    def __init__(self, backbone: Backbone, output_stride: int | None = None) -> None:
        """`output_stride`: stages with a larger stride are dilated."""
        super().__init__()
        parts = dict(backbone.named_children())
        self.names = [name for name in parts if name.startswith("layer")]
        if len(self.names) < 2 or not {"conv1", "bn1"} <= parts.keys():
            raise ConfigError(
                f"{type(backbone).__name__} has no stages layer1, layer2 ... behind conv1 and bn1: detection and "
                "segmentation need a ResNet, as resnet50 or resnet_tiny, or a network of timm with stages or blocks"
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


class Intermediates(nn.Module):
    """A network of timm: the last four stages of one that has stages, as `features_only` gives them; of a transformer
    without, tokens as maps, behind three quarters of its blocks and behind the last (`plain`), both normalised. Its
    attention is over the whole image, and its positions are interpolated."""

    def __init__(self, backbone: Any, output_stride: int | None = None) -> None:
        super().__init__()
        strides: list[int] = [stage["reduction"] for stage in backbone.feature_info]
        kind = type(backbone).__name__
        self.plain, count = len(set(strides)) == 1, len(strides)
        if output_stride is not None and output_stride < strides[-1]:
            try:
                backbone = dilated(backbone, output_stride)
            except ConfigError:
                own = f"{kind} cannot be dilated, its last map has a stride of {strides[-1]}"
                raise ConfigError(f"{own}: set model.output_stride={strides[-1]}") from None
        self.network = backbone
        self.taken = sorted({3 * count // 4 - 1, count - 1} - {-1}) if self.plain else list(range(count))[-4:]
        backbone.prune_intermediate_layers(self.taken, prune_norm=not self.plain)  # what maps do not pass through
        self.names = [f"{'block' if self.plain else 'stage'}{number}" for number in self.taken]
        try:
            self.channels, self.strides = _measure(self)
        except (AssertionError, RuntimeError) as error:
            words = f"{kind} takes images of one size alone ({reason(error)})"
            raise ConfigError(f"{words}: choose another backbone") from None
        if self.plain:
            self.strides = dict.fromkeys(self.names, strides[-1])

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Maps:
        options = {"indices": self.taken, "norm": self.plain, "intermediates_only": True}
        return dict(zip(self.names, self.network.forward_intermediates(images, **options), strict=True))


def build_trunk(backbone: Any, output_stride: int | None = None) -> Trunk | Intermediates:
    resnet = {"conv1", "bn1", "layer1", "layer2"} <= dict(backbone.named_children()).keys()
    if not resnet and hasattr(backbone, "prune_intermediate_layers") and hasattr(backbone, "feature_info"):
        return Intermediates(backbone, output_stride)
    return Trunk(backbone, output_stride)


@torch.no_grad()
def _measure(trunk: Trunk | Intermediates) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """The channels of each stage, and its stride in pixels of the image."""
    training, size = trunk.training, 64
    device = next(trunk.parameters()).device
    maps = trunk.eval()(torch.zeros(1, 3, size, 2 * size, device=device))
    trunk.train(training)
    channels = {name: one.shape[1] for name, one in maps.items()}
    return channels, {name: size // one.shape[2] for name, one in maps.items()}
