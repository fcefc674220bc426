"""The picture of queries and what matches them: crops framed red and yellow, one line a query."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

Pixels = UInt8[np.ndarray, "height width 3"]

CELL, FRAME, GAP, MARGIN, CAPTION = 96, 3, 6, 10, 18  # pixels of the drawn picture
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


def draw(rows: list[GalleryRow]) -> Image.Image:
    """One line a query: its crop framed red, its matches framed yellow with their cosines below; a green tick where
    the images share a true label."""
    pitch = CELL + 2 * FRAME + GAP
    across = 1 + max((len(row.matches) for row in rows), default=0)
    width = 2 * MARGIN + across * pitch - GAP + 2 * GAP  # the query stands a little apart
    picture = Image.new("RGB", (width, 2 * MARGIN + len(rows) * (pitch + CAPTION) - GAP), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    for line, row in enumerate(rows):
        top = MARGIN + line * (pitch + CAPTION)
        _frame(picture, pen, row.query, (MARGIN, top), RED)
        for number, (match, score) in enumerate(zip(row.matches, row.scores, strict=True)):
            left = MARGIN + (number + 1) * pitch + 2 * GAP
            _frame(picture, pen, match, (left, top), YELLOW)
            middle, below = left + FRAME + CELL // 2, top + CELL + 2 * FRAME + CAPTION // 2
            pen.text((middle, below), f"{score:.2f}", fill=INK, font=font, anchor="mm")
            if row.shared is not None and row.shared[number]:
                x, y = middle + 20, below
                pen.line([(x, y), (x + 3, y + 4), (x + 10, y - 5)], fill=GREEN, width=2)
    return picture


def _frame(picture: Image.Image, pen: ImageDraw.ImageDraw, crop: Pixels, corner: tuple[int, int], colour: str) -> None:
    left, top = corner
    pen.rectangle([left, top, left + CELL + 2 * FRAME - 1, top + CELL + 2 * FRAME - 1], fill=colour)
    picture.paste(cell(crop), (left + FRAME, top + FRAME))


def cell(crop: Pixels) -> Image.Image:
    """A crop in the size of a cell: the pixels of tiny crops stay visible, larger ones are smoothed."""
    tiny = max(crop.shape[:2]) < CELL
    return Image.fromarray(crop).resize((CELL, CELL), Image.Resampling.NEAREST if tiny else Image.Resampling.BILINEAR)
