"""The projection head, between the backbone feature g and the projection z, and the predictor that may follow it."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import nn


def projection_head(features: int, hidden: int, outputs: int, norm: Literal["none", "batch"]) -> nn.Sequential:
    """MoCo-v2's two-layer MLP; `norm="batch"` normalises after each layer, which short runs need."""
    if norm == "none":
        return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
    return normalised_mlp([features, hidden, outputs])


def normalised_mlp(widths: Sequence[int]) -> nn.Sequential:
    """Batch normalisation after each layer, the last one without scale and shift (SimCLR, MoCo-v3)."""
    parts: list[nn.Module] = []
    for before, after in pairwise(widths[:-1]):
        parts += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
    last = nn.Linear(widths[-2], widths[-1], bias=False)
    return nn.Sequential(*parts, last, nn.BatchNorm1d(widths[-1], affine=False))


def predictor(width: int, hidden: int) -> nn.Sequential:
    """The predictor of BYOL and SimSiam: what one side adds to its projection to foretell the other's."""
    return nn.Sequential(
        nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, width)
    )
