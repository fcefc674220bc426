"""The baseline of a backbone: the same network untrained. Its batch normalisation first gets the statistics of the
images; with those of initialisation its features would be noise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mls.chunks import chunks
from mls.config import Config
from mls.data import Source
from mls.data.augment import normalise
from mls.data.crops import centre, decode
from mls.models import build_pair
from mls.models.backbones import measuring_norms

STATISTICS_IMAGES = 2048  # on which the statistics of batch normalisation are measured


def untrained(config: Config, source: Source) -> nn.Module:
    """The recipe's backbone as initialised, with batch statistics of the source's images."""
    backbone = build_pair(config.model, config.run.seed).query.backbone

    def batches() -> Iterator[Tensor]:
        for chunk in chunks(min(STATISTICS_IMAGES, len(source)), 128):
            ids = range(chunk.start, chunk.stop)
            images = torch.stack([centre(decode(source.read(i)), config.augment.size) for i in ids])
            yield normalise(images, config.augment, torch.device("cpu"))

    return with_batch_statistics(backbone, batches())


@torch.no_grad()
def with_batch_statistics(backbone: nn.Module, batches: Iterable[Float[Tensor, "batch 3 height width"]]) -> nn.Module:
    """Set the statistics of batch normalisation to those of these images, in place."""
    measuring_norms(backbone)
    for images in batches:
        backbone(images)
    return backbone.eval()
