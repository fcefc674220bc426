"""Images to frozen features: whole images, no augmentation. The monitor, the demo and eval/ all embed this way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mls.config import AugmentConfig
from mls.data import Source
from mls.data.augment import normalise
from mls.data.crops import centre, decode


@torch.no_grad()
def embed(
    backbone: nn.Module,
    source: Source,
    ids: Sequence[int],
    config: AugmentConfig,
    device: torch.device | str = "cpu",
    batch: int = 250,
    progress: Callable[[int], None] = lambda done: None,
) -> Float[Tensor, "images dim"]:
    """Features of the images `ids`, on the CPU; each image is centred and scaled to config.size."""
    device, training = torch.device(device), backbone.training
    backbone.eval().to(device)
    features = []
    for start in range(0, len(ids), batch):
        images = torch.stack([centre(decode(source.read(int(i))), config.size) for i in ids[start : start + batch]])
        features.append(backbone(normalise(images, config, device)).float().cpu())
        progress(min(start + batch, len(ids)))
    backbone.train(training)
    return torch.cat(features)
