"""A backbone of your own: a small network of depthwise convolutions. Anything that maps images, [batch, 3, height,
width], to features, [batch, feature_dim], is one.

mls pretrain mls_scenes_tiny --import examples/my_backbone.py model.backbone=tiny_mixer
mls eval run knn_scenes --weights runs/mls_scenes_tiny-…       (the run knows which file defines its backbone)
"""

import torch
from torch import Tensor, nn

from mls.models import backbones


class Mixer(nn.Module):
    """Mixes places, then channels, beside an identity, as in ConvMixer (https://arxiv.org/abs/2201.09792)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.places = nn.Conv2d(width, width, 5, padding=2, groups=width, bias=False)
        self.channels = nn.Conv2d(width, width, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:  # [batch, width, height, width]
        x = x + torch.relu(self.norm1(self.places(x)))
        return torch.relu(self.norm2(self.channels(x)))


@backbones.register("tiny_mixer")
class TinyMixer(nn.Module):
    def __init__(self, width: int = 96, depth: int = 4, patch: int = 4) -> None:
        super().__init__()
        self.feature_dim = width  # the width of its output
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.layers = nn.Sequential(*(Mixer(width) for _ in range(depth)))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(self.patches(images)).mean((2, 3))  # [batch, feature_dim]
