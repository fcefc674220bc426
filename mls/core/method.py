"""The contract between a method and the trainer: forward has no side effects, state moves in `after_step` alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mls.core.dictionary import Rows
from mls.core.products import Mask
from mls.data import Views


@dataclass
class Keys:
    """What a step adds to the dictionary: the key side of all processes' images."""

    backbone: Float[Tensor, "batch features"]
    projection: Float[Tensor, "batch projection"]
    ids: Int64[Tensor, batch]
    boxes: Float[Tensor, "batch 4"]


@dataclass
class Queries:
    """One crop of each image, embedded with gradient: this process' own, and those that its rows are asked for, which
    are everyone's where the dictionary is sharded and its own where it is not."""

    g: Float[Tensor, "batch features"]
    z: Float[Tensor, "batch projection"]
    all_g: Float[Tensor, "everyone features"]
    all_z: Float[Tensor, "everyone projection"]


@dataclass
class Seen:
    """The dictionary as all of a step sees it."""

    rows: Rows  # that this process holds
    exclude: Mask | None  # of them, those that may be neither match nor negative of a query
    counted: Int64[Tensor, batch]  # rows of all processes that are left for each of this process' queries


@dataclass
class StepOutput:
    loss: Float[Tensor, ""]
    keys: Keys
    scalars: dict[str, Tensor] = field(default_factory=dict)  # detached, for the log
    parts: dict[str, Tensor] = field(default_factory=dict)  # the loss' parts, with gradient
    outputs: list[Tensor] = field(default_factory=list)  # where the gradient of a part is measured: z1 (and g1)
    matched_ids: Int64[Tensor, "batch k"] | None = None  # images behind the matched rows, for monitoring
    query_ids: Int64[Tensor, batch] | None = None


class Method(nn.Module):
    """A pretraining method.

    >>> from mls.core.methods import names
    >>> names()
    ['knn_moco', 'mls', 'moco_v2', 'supervised']
    """

    def forward(self, views: Views) -> StepOutput:
        raise NotImplementedError

    def decide(self, decided: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """Called once before the first step: settles what the configuration leaves to measurement. `decided` is what
        was decided when the run began, if it is a resume; what is returned is kept in the checkpoint."""
        return {}

    def set_progress(self, step: int, epoch: int, steps_per_epoch: int) -> None:
        """Called before each step; both count from 1. What it sets depends on nothing else, so a resume needs none."""

    def after_step(self, outputs: list[StepOutput]) -> None:
        """Called once after the optimizer's step, with the output of each micro-batch."""
        raise NotImplementedError


def gradient_norms(out: StepOutput) -> dict[str, float]:
    """The norm of each loss part's gradient at the network's outputs: how hard each part pulls."""
    norms = {}
    for name, part in out.parts.items():
        if not part.requires_grad:
            continue
        grads = torch.autograd.grad(part, out.outputs, retain_graph=True, allow_unused=True)
        norms[name] = sum((g.float().square().sum().item() for g in grads if g is not None), 0.0) ** 0.5
    return norms
