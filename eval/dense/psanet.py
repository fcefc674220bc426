"""PSANet's decoder (https://hszhao.github.io/papers/eccv18_psanet.pdf), as mmsegmentation builds it: every position
collects from all others and distributes to them, with weights that it predicts for a window around itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mls.eval.dense.heads import Classify, Map, convolution, resized
from mls.frameworks.psamask import spread

WINDOW = (97, 97)  # positions, height and width, as in all of mmsegmentation's configurations
SHRINK = 2  # attention is between every second position


class PSANet(nn.Module):
    def __init__(self, inputs: int, width: int, classes: int, dropout: float, window: tuple[int, int] = WINDOW) -> None:
        super().__init__()
        self.collect, self.distribute = Attention(inputs, width, window), Attention(inputs, width, window)
        # mmsegmentation pads this 1x1 convolution, so that resizing shrinks the map a little towards its centre. So do
        # we, because the published tables were made with this network.
        self.project = convolution(2 * width, inputs, 1)
        cast(nn.Conv2d, self.project[0]).padding = (1, 1)
        self.join = convolution(2 * inputs, width)
        self.classify = Classify(width, classes, dropout)

    def forward(self, x: Map) -> Map:
        size, align_corners = shrunk(x.shape[2:])
        values, weights = self.collect(x, size, align_corners)
        collected = torch.einsum("bcj,bji->bci", values.flatten(2), weights.softmax(1))
        values, weights = self.distribute(x, size, align_corners)
        distributed = torch.einsum("bcj,bji->bci", values.flatten(2), weights.transpose(1, 2).softmax(1))
        y = self.project(torch.cat([collected, distributed], 1).unflatten(2, size))
        y = resized(y, x.shape[2:], align_corners)
        return self.classify(self.join(torch.cat([x, y], 1)))


class Attention(nn.Module):
    """The values of all positions, and the attention weights of every pair of positions [batch, other, this]."""

    def __init__(self, inputs: int, width: int, window: tuple[int, int]) -> None:
        super().__init__()
        self.window = window
        self.reduce = convolution(inputs, width, 1)
        self.weigh = nn.Sequential(convolution(width, width, 1), nn.Conv2d(width, window[0] * window[1], 1, bias=False))

    def forward(
        self, x: Map, size: tuple[int, int], align_corners: bool
    ) -> tuple[Map, Float[Tensor, "batch other this"]]:
        values = resized(self.reduce(x), size, align_corners)
        return values, spread(self.weigh(values), self.window)


def shrunk(size: Sequence[int]) -> tuple[tuple[int, int], bool]:
    """The size of the map for attention, and whether resizing aligns corners: mmsegmentation's rule.

    >>> shrunk((97, 97)), shrunk((64, 128))
    (((49, 49), True), ((32, 64), False))
    """
    height, width = size
    if height % SHRINK and width % SHRINK:
        return ((height - 1) // SHRINK + 1, (width - 1) // SHRINK + 1), True
    return (height // SHRINK, width // SHRINK), False
