"""Maps of features as colours: three principal components of the features of all places of some images, as red, green
and blue. Each network has its own components, since features of two networks have nothing in common place by place; the
second's are turned so that its colours are as near as they can be to the first's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mls.frozen.match_picture import end_of

Maps = Float[Tensor, "images dim rows columns"]
SIDE, GAP, HEAD = 200, 6, 34  # pixels of the drawn picture
RANGE = (0.01, 0.99)  # shares of the places between which colours go from nothing to full
INK = "#222222"


@dataclass(frozen=True)
class Coloured:
    components: Float[Tensor, "images 3 rows columns"]
    explained: float  # share of the variance of the features that the three components have
    agreement: float | None = None  # share of the first network's components that the turned ones explain

    def pixels(self) -> UInt8[Tensor, "images rows columns 3"]:
        """One scale for all images: a colour means the same in each of them."""
        flat = self.components.transpose(0, 1).flatten(1)  # [3, places]
        low, high = (torch.quantile(flat, share, dim=1)[None, :, None, None] for share in RANGE)
        scaled = ((self.components - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
        return (255 * scaled).round().to(torch.uint8).permute(0, 2, 3, 1)


def coloured(maps: Maps, like: Coloured | None = None) -> Coloured:
    """The components of features of unit length.

    >>> maps = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    >>> first = coloured(maps)
    >>> mirrored = coloured(maps[:, torch.arange(7, -1, -1)], like=first)  # the same features, numbered otherwise
    >>> round(mirrored.agreement, 4)
    1.0
    """
    rows = F.normalize(maps.double(), dim=1).movedim(1, 3).flatten(0, 2)  # [places, dim]
    left, singular, _ = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    found = F.pad(left[:, :3] * singular[:3], (0, max(0, 3 - len(singular))))  # few places have fewer components
    explained = float(singular[:3].square().sum() / singular.square().sum().clamp(min=1e-30))
    found = found / found.norm().clamp(min=1e-30)
    shape = (len(maps), *maps.shape[2:], 3)
    components = found.view(shape).movedim(3, 1)
    if like is None:
        return Coloured(components.float(), explained)
    target = like.components.double()
    here = F.interpolate(components, target.shape[2:], mode="bilinear").movedim(1, 3).flatten(0, 2)
    there = target.movedim(1, 3).flatten(0, 2)
    one, _, other = torch.linalg.svd(here.T @ there)
    turned = here @ (one @ other)  # the rotation of orthogonal Procrustes
    scale = (turned * there).sum() / turned.square().sum().clamp(min=1e-30)
    missed = (there - scale * turned).square().sum() / there.square().sum().clamp(min=1e-30)
    components = torch.einsum("nchw,cd->ndhw", components, one @ other)
    return Coloured(components.float(), explained, float(1 - missed))


def draw(
    images: Sequence[UInt8[Tensor, "3 height width"]], names: Sequence[str], found: Sequence[Coloured]
) -> Image.Image:
    """A line an image: it, and its map by each network."""
    columns = [[Image.fromarray(one.permute(1, 2, 0).numpy()) for one in images]]
    columns += [[Image.fromarray(one.numpy()) for one in network.pixels()] for network in found]
    sizes = [_fitting(*one.shape[1:]) for one in images]
    tops = [HEAD + sum(height + GAP for _, height in sizes[:row]) for row in range(len(images) + 1)]
    pitch = SIDE + GAP
    sheet = Image.new("RGB", (GAP + len(columns) * pitch, tops[-1]), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for column, (head, pictures) in enumerate(zip(["image", *names], columns, strict=True)):
        left = GAP + column * pitch
        told = "" if column == 0 else f"{found[column - 1].explained:.0%} of the variance"
        pen.text((left, 3), end_of(head, SIDE, font), fill=INK, font=font)
        pen.text((left, 17), told, fill=INK, font=font)
        for row, picture in enumerate(pictures):
            how = Image.Resampling.BILINEAR if column == 0 else Image.Resampling.NEAREST  # each place is seen
            sheet.paste(picture.resize(sizes[row], how), (left, tops[row]))
    return sheet


def _fitting(height: int, width: int) -> tuple[int, int]:
    """Width and height of a picture in the sheet.

    >>> _fitting(300, 400)
    (200, 150)
    """
    long = max(height, width)
    return max(1, SIDE * width // long), max(1, SIDE * height // long)
