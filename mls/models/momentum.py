"""The query encoder and its slowly moving average, the key encoder. The only place where the average is taken."""

import copy
from typing import Generic, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mls.errors import ConfigError
from mls.models.backbones import Backbone, drop_paths
from mls.models.spatial import pooled_and_map

Precision = Literal["fp32", "bf16", "fp16"]
Wanted = Literal["auto", "fp32", "bf16", "fp16"]
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def precision_on(device: torch.device, wanted: Wanted, key: str = "engine.precision") -> Precision:
    if wanted == "fp16" and device.type == "cpu":
        raise ConfigError(f"{key}=fp16 needs a GPU: use {key}=bf16 or fp32 on a CPU")
    if wanted == "auto":  # bf16 is four times slower than fp32 on a CPU without matrix units for it
        return "bf16" if device.type == "cuda" else "fp32"
    return wanted


class Encoder(nn.Module):
    """Backbone and projection head: images to (g, z)."""

    def __init__(self, backbone: Backbone, head: nn.Module, precision: Precision = "fp32") -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.reduced = HALF.get(precision)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], head: nn.Module | None = None
    ) -> tuple[Float[Tensor, "batch features"], Float[Tensor, "batch projection"]]:
        """`head`: another than its own."""
        with torch.autocast(images.device.type, dtype=self.reduced, enabled=self.reduced is not None):
            feature = self.backbone(images)
            projection = (head or self.head)(feature)
        return feature.float(), projection.float()  # everything after the network is done in fp32

    def projected(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch projection"]:
        with torch.autocast(features.device.type, dtype=self.reduced, enabled=self.reduced is not None):
            return self.head(features).float()

    def spatial(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> tuple[
        Float[Tensor, "batch features"], Float[Tensor, "batch projection"], Float[Tensor, "batch features rows columns"]
    ]:
        """The same, and the map that the feature is pooled from."""
        with torch.autocast(images.device.type, dtype=self.reduced, enabled=self.reduced is not None):
            feature, maps = pooled_and_map(self.backbone, images)
            projection = self.head(feature)
        return feature.float(), projection.float(), maps.float()


Network = TypeVar("Network", bound=nn.Module)


class EncoderPair(nn.Module, Generic[Network]):
    """`query` learns, `key` follows it."""

    query: Network
    key: Network

    def __init__(self, query: Network) -> None:
        super().__init__()
        self.query = query
        self.key = copy.deepcopy(query)
        self.key.requires_grad_(False)
        for module in drop_paths(self.key):  # keys are of the whole network, as DINO's teacher's
            module.drop_prob = 0.0

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """key = momentum · key + (1 − momentum) · query. Batch statistics stay each encoder's own."""
        torch._foreach_lerp_(list(self.key.parameters()), list(self.query.parameters()), 1 - momentum)
