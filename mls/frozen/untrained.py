"""What a backbone must beat: the same network untrained. Its batch statistics are taken from the images first, else the
comparison would be against noise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mls.config import Config
from mls.data import Source
from mls.data.augment import normalise
from mls.data.crops import centre, decode
from mls.models import build_pair

IMAGES = 2048  # enough for batch statistics


def untrained(config: Config, source: Source) -> nn.Module:
    """The recipe's backbone as training would start it, with batch statistics of its images."""
    backbone = build_pair(config.model, config.run.seed).query.backbone

    def batches() -> Iterator[Tensor]:
        for start in range(0, min(IMAGES, len(source)), 128):
            ids = range(start, min(start + 128, len(source)))
            images = torch.stack([centre(decode(source.read(i)), config.augment.size) for i in ids])
            yield normalise(images, config.augment, torch.device("cpu"))

    return calibrated(backbone, batches())


@torch.no_grad()
def calibrated(backbone: nn.Module, batches: Iterable[Float[Tensor, "batch 3 height width"]]) -> nn.Module:
    """The backbone, in place, with the mean and variance of these images in its batch normalisation."""
    backbone.train()
    for module in backbone.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # a plain mean over all batches
    for images in batches:
        backbone(images)
    return backbone.eval()
