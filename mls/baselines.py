"""What a backbone must beat: the same network untrained. Its batch statistics are taken from the images first, else the
comparison would be against noise."""

from __future__ import annotations

import torch
from torch import nn

from mls.config import Config
from mls.data import Source
from mls.data.augment import normalise
from mls.data.crops import centre, decode
from mls.models import build_pair


@torch.no_grad()
def untrained(config: Config, source: Source, images: int = 2048) -> nn.Module:
    """The recipe's backbone as training would start it, with batch statistics of up to `images` images."""
    backbone = build_pair(config.model, config.run.seed).query.backbone
    backbone.train()
    for module in backbone.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # a plain mean over all batches
    for start in range(0, min(images, len(source)), 128):
        ids = range(start, min(start + 128, len(source)))
        batch = torch.stack([centre(decode(source.read(i)), config.augment.size) for i in ids])
        backbone(normalise(batch, config.augment, torch.device("cpu")))
    return backbone.eval()
