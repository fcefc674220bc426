"""The projection head, between the backbone feature g and the projection z, and the predictor that may follow it."""

from typing import Literal

from torch import nn


def projection_head(features: int, hidden: int, outputs: int, norm: Literal["none", "batch"]) -> nn.Sequential:
    """MoCo-v2's two-layer MLP; `norm="batch"` normalises after each layer, which short runs need."""
    if norm == "none":
        return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
    return nn.Sequential(
        nn.Linear(features, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, outputs, bias=False),
        nn.BatchNorm1d(outputs, affine=False),
    )


def predictor(width: int, hidden: int) -> nn.Sequential:
    """The predictor of BYOL and SimSiam: what one side adds to its projection to foretell the other's."""
    return nn.Sequential(
        nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, width)
    )
