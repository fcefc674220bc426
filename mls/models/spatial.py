"""One pass through a backbone that gives the pooled feature and the map it is pooled from."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models import ResNet

from mls.errors import ConfigError
from mls.models.backbones import TinyResNet


def pooled_and_map(
    backbone: nn.Module, images: Float[Tensor, "batch 3 height width"]
) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch dim rows columns"]]:
    """The first is what `backbone(images)` gives.

    >>> g, maps = pooled_and_map(TinyResNet(), torch.zeros(1, 3, 64, 64))
    >>> g.shape, maps.shape
    (torch.Size([1, 128]), torch.Size([1, 128, 8, 8]))
    """
    if isinstance(backbone, TinyResNet):
        maps = backbone.maps(images)
        return maps.mean((2, 3)), maps
    if isinstance(backbone, ResNet):
        x = backbone.maxpool(backbone.relu(backbone.bn1(backbone.conv1(images))))
        maps = backbone.layer4(backbone.layer3(backbone.layer2(backbone.layer1(x))))
        return backbone.fc(torch.flatten(backbone.avgpool(maps), 1)), maps
    if hasattr(backbone, "forward_features") and hasattr(backbone, "forward_head"):
        network = cast(Any, backbone)  # of timm
        features = network.forward_features(images)
        return network.forward_head(features, pre_logits=True), _timm_map(network, features, images)
    raise ConfigError(f"{type(backbone).__name__} gives no map of features here: use a ResNet or a network of timm")


def _timm_map(backbone: nn.Module, features: Tensor, images: Tensor) -> Float[Tensor, "batch dim rows columns"]:
    if features.ndim == 4:
        channels_last = features.shape[1] != backbone.num_features  # Swin and its like
        return features.permute(0, 3, 1, 2) if channels_last else features
    tokens = features[:, getattr(backbone, "num_prefix_tokens", 0) :]  # without class token and registers
    height, width = images.shape[2:]
    rows = round((tokens.shape[1] * height / width) ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (rows, tokens.shape[1] // rows))
