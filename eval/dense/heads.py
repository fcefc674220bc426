"""The decoders of semantic segmentation, as mmsegmentation builds them: FCN and PSPNet; PSANet is in psanet.py. Each
maps the backbone's last map to class scores of the same resolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Map = Float[Tensor, "batch channels height width"]
POOL_SIZES = (1, 2, 3, 6)


def convolution(inputs: int, outputs: int, size: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


def resized(scores: Map, size: tuple[int, int] | torch.Size, align_corners: bool) -> Map:
    return F.interpolate(scores, tuple(size), mode="bilinear", align_corners=align_corners)


class Classify(nn.Sequential):
    """Dropout of whole channels, then a class score for each position."""

    def __init__(self, width: int, classes: int, dropout: float) -> None:
        scores = nn.Conv2d(width, classes, 1)
        super().__init__(nn.Dropout2d(dropout), scores)
        nn.init.normal_(scores.weight, std=0.01)
        assert scores.bias is not None
        nn.init.zeros_(scores.bias)


class FCN(nn.Module):
    """Convolutions, and one over the concatenation of their input and output (https://arxiv.org/abs/1411.4038)."""

    def __init__(self, inputs: int, width: int, classes: int, dropout: float, convolutions: int = 2) -> None:
        super().__init__()
        widths = [inputs, *[width] * convolutions]
        self.convolutions = nn.Sequential(*map(convolution, widths, widths[1:]))
        self.join = convolution(inputs + width, width) if convolutions > 1 else None
        self.classify = Classify(width, classes, dropout)

    def forward(self, x: Map) -> Map:
        y = self.convolutions(x)
        return self.classify(y if self.join is None else self.join(torch.cat([x, y], 1)))


class PSPNet(nn.Module):
    """The map concatenated with its means over 1, 2 x 2, 3 x 3 and 6 x 6 parts (https://arxiv.org/abs/1612.01105)."""

    def __init__(self, inputs: int, width: int, classes: int, dropout: float, align_corners: bool = False) -> None:
        super().__init__()
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), convolution(inputs, width, 1)) for size in POOL_SIZES
        )
        self.join = convolution(inputs + len(POOL_SIZES) * width, width)
        self.classify = Classify(width, classes, dropout)
        self.align_corners = align_corners

    def forward(self, x: Map) -> Map:
        parts = [resized(pool(x), x.shape[2:], self.align_corners) for pool in self.pools]
        return self.classify(self.join(torch.cat([x, *parts], 1)))
