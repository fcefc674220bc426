"""A backbone with a linear or a cosine head. Training is in training.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mls.core.losses import at_least_fp32
from mls.errors import ConfigError, unknown_name
from mls.models import load_backbone
from mls.models.backbones import Backbone
from mls.streams import derive, initialisation


class CosineHead(nn.Linear):
    """The cosines of the features with a label embedding per class, a row of `weight` (the hyperspherical classifier,
    ECCV 2022). Computed in fp32 or better for features of any precision."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__(dim, classes, bias=False)

    def forward(self, input: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch classes"]:
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(F.normalize(at_least_fp32(input)), F.normalize(at_least_fp32(self.weight)))


HEADS = {"linear": nn.Linear, "cosine": CosineHead}


class Classifier(nn.Module):
    """A backbone, which maps images to features [batch, dim], and a head, which maps these to logits or cosines.

    >>> classifier = build_classifier("resnet_tiny", classes=10)
    >>> classifier(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, backbone: Backbone, head: nn.Linear) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.frozen: list[nn.Module] = []

    @property
    def networks(self) -> Sequence[Classifier]:
        return [self]

    def freeze(self, modules: Iterable[nn.Module]) -> None:
        """Freeze these parts: no gradients, and evaluation mode while the rest trains."""
        self.frozen = list(modules)
        for module in self.frozen:
            module.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        return self.head(self.features(images))

    def features(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        return self.backbone(images)


class Several(nn.Module):
    """Classifiers that learn at once, for losses with `networks` above 1. The first is the one that is tested."""

    def __init__(self, networks: Sequence[Classifier]) -> None:
        super().__init__()
        self.networks: Sequence[Classifier] = nn.ModuleList(networks)  # type: ignore[assignment]

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch networks classes"]:
        return torch.stack([network(images) for network in self.networks], dim=1)

    def features(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch networks dim"]:
        return torch.stack([network.features(images) for network in self.networks], dim=1)

    def head(self, features: Float[Tensor, "batch networks dim"]) -> Float[Tensor, "batch networks classes"]:
        each = zip(self.networks, features.unbind(1), strict=True)
        return torch.stack([network.head(own) for network, own in each], dim=1)


def build_classifier(
    weights: str | Path, classes: int, head: Literal["linear", "cosine"] = "linear", seed: int = 0
) -> Classifier:
    """A classifier with a new head, in evaluation mode; `weights` as for `mls.load_backbone`.

    >>> build_classifier("scratch:densenet121", classes=10, head="cosine").head
    CosineHead(in_features=1024, out_features=10, bias=False)
    """
    if head not in HEADS:
        raise unknown_name("head", head, HEADS)
    with initialisation(seed):
        backbone = load_backbone(weights)
        # A stream of its own: the head does not depend on how many numbers the backbone draws.
        torch.manual_seed(derive(seed, "init", "classifier"))
        return Classifier(backbone, HEADS[head](backbone.feature_dim, classes)).eval()


class _GlobalPooling(TorchFunctionMode):
    """Stores the last map that is averaged over its positions, by a module or in code."""

    POOLS = (F.adaptive_avg_pool2d, torch.mean, Tensor.mean)

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.map: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self.POOLS and args and args[0].ndim == 4 and args[0].shape[1] == self.dim:
            self.map = args[0]
        return func(*args, **(kwargs or {}))


def last_map(
    backbone: Backbone, images: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch dim map_height map_width"]:
    """The map whose mean over positions is the features, in evaluation mode. With a linear head, the class activation
    map of class c is therefore `head.weight[c]` times it.

    >>> last_map(load_backbone("resnet_tiny"), torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 128, 4, 4])
    """
    with _GlobalPooling(backbone.feature_dim) as pooling:
        features = backbone(images)
    if pooling.map is not None:
        difference = (pooling.map.mean((2, 3)) - features).norm()
        if difference <= 0.01 * features.norm():  # bf16 rounds this much
            return pooling.map
    raise ConfigError(
        f"the features of {type(backbone).__name__} are not the mean of a map, so there are no class activation maps: "
        "choose a network whose head follows global average pooling, such as resnet50, in evaluation mode"
    )
