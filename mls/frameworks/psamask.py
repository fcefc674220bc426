"""The point-wise attention of PSANet (https://hszhao.github.io/papers/eccv18_psanet.pdf): every position predicts
weights for a window around it, which are placed on the whole map. For our own network and for mmcv's operator."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def spread(
    weights: Float[Tensor, "batch window height width"], window: tuple[int, int]
) -> Float[Tensor, "batch other this"]:
    """Each position's weights for its window, placed on the whole map; 0 outside the window."""
    index, inside = pairs(weights.shape[2], weights.shape[3], window, weights.device)
    return weights.flatten(2).gather(1, index.expand(len(weights), -1, -1)) * inside


def gathered(
    gradient: Float[Tensor, "batch other this"], height: int, width: int, window: tuple[int, int]
) -> Float[Tensor, "batch window height width"]:
    """The gradient of `spread` with respect to the weights."""
    index, inside = pairs(height, width, window, gradient.device)
    back = gradient.new_zeros(len(gradient), window[0] * window[1], height * width)
    back.scatter_add_(1, index.expand(len(gradient), -1, -1), gradient * inside)
    return back.unflatten(2, (height, width))


def pairs(
    height: int, width: int, window: tuple[int, int], device: torch.device
) -> tuple[Int64[Tensor, "1 other this"], Bool[Tensor, "other this"]]:
    """For each pair of positions, the index of its weight in the window, and whether the pair lies in the window."""
    place = torch.arange(height * width, device=device)
    inside, index = torch.ones(len(place), len(place), dtype=torch.bool, device=device), 0
    for position, side in ((place // width, window[0]), (place % width, window[1])):
        offset = position[:, None] - position + (side - 1) // 2
        inside &= (offset >= 0) & (offset < side)
        index = index * side + offset.clamp(0, side - 1)
    return index[None], inside
