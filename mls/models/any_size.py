"""Vision transformers on images of any size: positions are interpolated, images filled up to whole patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from mls.errors import ConfigError, reason


class AnySizeVisionTransformer(VisionTransformer):
    """torchvision's, which by itself takes images of one size."""

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        return self.heads(tokens(self, x)[:, 0])


def tokens(
    network: VisionTransformer, images: Float[Tensor, "batch 3 height width"], last: int | None = None
) -> Float[Tensor, "batch tokens dim"]:
    """The class token and those of the patches, normalised, behind block `last` (default: the last one)."""
    side, (height, width) = network.patch_size, images.shape[2:]
    maps = network.conv_proj(F.pad(images, (0, -width % side, 0, -height % side)))
    x = torch.cat([network.class_token.expand(len(images), -1, -1), maps.flatten(2).transpose(1, 2)], dim=1)
    x = network.encoder.dropout(x + _positions(network.encoder.pos_embedding, maps.shape[2:]))
    for number, block in enumerate(network.encoder.layers):
        x = block(x)
        if number == last:
            break
    return network.encoder.ln(x)


def _positions(learnt: Float[Tensor, "1 learnt dim"], grid: torch.Size) -> Float[Tensor, "1 tokens dim"]:
    """Bicubic, as DINO and timm interpolate them; behind the class token's."""
    side = round((learnt.shape[1] - 1) ** 0.5)
    if tuple(grid) == (side, side):
        return learnt
    square = learnt[:, 1:].transpose(1, 2).unflatten(2, (side, side))
    wanted = F.interpolate(square, tuple(grid), mode="bicubic", antialias=True)
    return torch.cat([learnt[:, :1], wanted.flatten(2).transpose(1, 2)], dim=1)


@torch.no_grad()
def refuse_size(backbone: nn.Module, size: int, what: str) -> None:
    """Networks that take one size alone say so in assertions, in the middle of the first step."""
    training = backbone.training
    parameter = next(backbone.parameters())
    try:
        backbone.eval()(torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype))
    except (AssertionError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ConfigError(
            f"{type(backbone).__name__} takes no images of {size} × {size} ({reason(error)}): change {what}, or "
            "choose another model.backbone"
        ) from None
    finally:
        backbone.train(training)
