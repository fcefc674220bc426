"""The picture of queries and what matches them, red and yellow, one line a query: crops, or boxes in whole images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps

Pixels = UInt8[np.ndarray, "height width 3"]
Box = Sequence[float]  # x0 y0 x1 y1 as shares of the image's width and height

CELL, FRAME, GAP, MARGIN, CAPTION = 96, 3, 6, 10, 18  # pixels of the drawn picture
WHOLE = 160  # pixels of the longer side of a whole image
RED, YELLOW, GREEN, INK = "#d62728", "#f2b701", "#1b7f3b", "#222222"


@dataclass(frozen=True)
class GalleryRow:
    """One query crop and its matches, nearest first."""

    query: Pixels
    matches: list[Pixels]
    scores: list[float]  # cosines
    shared: list[bool] | None  # has the match's image a true label in common with the query's? None without labels
    query_id: int
    match_ids: list[int]
    query_box: Box | None = None  # where the crops lie in their images; None: not known
    match_boxes: Sequence[Box] | None = None


def draw(rows: list[GalleryRow], cell: int = CELL, frame: int = FRAME) -> Image.Image:
    """One line a query: its crop framed red, its matches framed yellow with their cosines below; a green tick where
    the images share a true label."""
    side = cell + 2 * frame
    pitch = side + GAP
    across = 1 + max((len(row.matches) for row in rows), default=0)
    width = 2 * MARGIN + across * pitch - GAP + 2 * GAP  # the query stands a little apart
    picture = Image.new("RGB", (width, 2 * MARGIN + len(rows) * (pitch + CAPTION) - GAP), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    framed = lambda crop, colour: ImageOps.expand(_scaled(crop, (cell, cell)), frame, colour)
    for line, row in enumerate(rows):
        top = MARGIN + line * (pitch + CAPTION)
        picture.paste(framed(row.query, RED), (MARGIN, top))
        for number, (match, score) in enumerate(zip(row.matches, row.scores, strict=True)):
            left = MARGIN + (number + 1) * pitch + 2 * GAP
            picture.paste(framed(match, YELLOW), (left, top))
            middle, below = left + side // 2, top + side + CAPTION // 2
            pen.text((middle, below), f"{score:.2f}", fill=INK, font=font, anchor="mm")
            if row.shared is not None and row.shared[number]:
                x, y = middle + 20, below
                pen.line([(x, y), (x + 3, y + 4), (x + 10, y - 5)], fill=GREEN, width=2)
    return picture


def _scaled(pixels: Pixels, size: tuple[int, int]) -> Image.Image:
    """The pixels of tiny images stay visible, larger ones are smoothed."""
    tiny = max(pixels.shape[:2]) < max(size)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST if tiny else Image.Resampling.BILINEAR)


def boxed(image: Pixels, box: Box, colour: str) -> Pixels:
    """The whole image, its longer side WHOLE pixels, in the middle of a white square, with a box drawn in it."""
    height, width = (max(1, round(WHOLE * side / max(image.shape[:2]))) for side in image.shape[:2])
    small = _scaled(image, (width, height))
    x0, y0, x1, y1 = (round(share * side) for share, side in zip(box, (width, height) * 2, strict=True))
    ImageDraw.Draw(small).rectangle([x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)], outline=colour, width=FRAME)
    return np.asarray(ImageOps.pad(small, (WHOLE, WHOLE), color="white"))
